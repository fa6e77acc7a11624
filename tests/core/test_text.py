"""Where a phrase stands in a text, whatever letters come before it."""

import pytest

from cutaway.core.refuse import Refused
from cutaway.core.text import check_encodable, occurrences


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("the capital of France", "france", ["France"]),
        ("İSTANBUL'DA İKİ GÜN, then France", "France", ["France"]),
        ("ﬁne ẞ aside, the Straße", "STRASSE", ["Straße"]),
        ("in İstanbul", "istanbul", ["İstanbul"]),
        ("a cafe\u0301 here", "CAF\u00c9", ["cafe\u0301"]),
        ("a caf\u00e9 here", "cafe\u0301", ["caf\u00e9"]),
        ("\u0301 France", "France", ["France"]),
        ("𝕀𝕤𝕥 France", "𝕀𝕤𝕥", ["𝕀𝕤𝕥"]),
        ("This is It is", "is", ["is", "is", "is"]),
        ("US and us", "us", ["us", "US"]),
        ("a café", "cafe", []),  # é is no e, and ß is no s
        ("ß", "s", []),
        ("France", "", []),
    ],
)
def test_a_phrase_is_found_where_it_stands(text, phrase, found):
    assert [text[a:b] for a, b in occurrences(text, phrase)] == found


def test_whole_words_go_before_parts_of_words():
    assert occurrences("This is", "is") == [(5, 7), (2, 4)]
    assert occurrences("cafe\u0301s, cafe\u0301", "café") == [(8, 13), (0, 5)]


def test_halves_of_characters_are_refused():
    check_encodable("a 𝕀 \ufffd", "text")
    with pytest.raises(Refused, match=r"\\ud83d, half"):
        check_encodable("cut \ud83d", "text")
