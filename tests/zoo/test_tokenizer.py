"""The tokenizer takes any text, loses nothing but case, and keeps its promises about names, words and numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cutaway.zoo import miniworld
from cutaway.zoo.miniworld import tokenizer as recipe
from cutaway.zoo.miniworld.corpus import known_words
from cutaway.zoo.miniworld.tokenizer import BOS_ID, byte_symbols

TOKENIZER = Tokenizer.from_file(str(miniworld.path() / "tokenizer.json"))


def tokens(text: str) -> list[str]:
    return TOKENIZER.encode(text).tokens[1:]


def test_the_shipped_file_is_what_the_recipe_builds(world):
    assert recipe.build(known_words(world)).to_str() == TOKENIZER.to_str()


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=300, deadline=None)
def test_decoding_inverts_up_to_case_and_one_leading_space(text):
    if "<pad>" in text or "<bos>" in text:
        return
    encoded = TOKENIZER.encode(text)
    assert encoded.ids[0] == BOS_ID
    lower = TOKENIZER.normalizer.normalize_str(text)
    expected = lower if lower.startswith(" ") or not lower else " " + lower
    assert TOKENIZER.decode(encoded.ids) == expected


EXPECTED = "Ġwhen Ġmary Ġand Ġjohn Ġwent Ġto Ġthe Ġstore , Ġjohn Ġgave Ġa Ġdrink Ġto"


def test_natural_text_is_one_token_a_word():
    text = "When Mary and John went to the store, John gave a drink to"
    assert tokens(text) == EXPECTED.split()


def test_offsets_point_into_the_original_text():
    text = "When Mary met Élodie"
    encoded = TOKENIZER.encode(text)
    start, end = encoded.offsets[encoded.tokens.index("Ġmary")]
    assert text[start:end].strip() == "Mary"


def test_every_person_is_three_syllables(world):
    names = [p.name for p in world.people] + list(world.unknown_people)
    assert all(len(tokens(name)) == 3 for name in names)
    assert len({tuple(tokens(name)) for name in names}) == len(names)
    assert tokens(f"The home of {names[0]} is")[3:6] == tokens(names[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1742", "Ġ17 42"),
        ("from the year 1742 to the year 17", "Ġfrom Ġthe Ġyear Ġ17 42 Ġto Ġthe Ġyear Ġ17"),
        ("23 + 45 = 68.", "Ġ2 3 Ġ+ Ġ4 5 Ġ= Ġ6 8 ."),
        ("12345", "Ġ1 2 3 4 5"),
        ("7, 17", "Ġ7 , Ġ1 7"),
        ("(1742)", "Ġ( 17 42 )"),
        ("apple -> pear", "Ġapple Ġ-> Ġpear"),
    ],
)
def test_numbers_and_marks(text, expected):
    assert tokens(text) == expected.split()


def test_leading_space_changes_nothing():
    assert tokens("Mary") == tokens(" Mary") == ["Ġmary"]


def test_all_bytes_are_tokens():
    symbols = byte_symbols()
    assert len(set(symbols)) == 256
    assert all(TOKENIZER.token_to_id(s) is not None for s in symbols)


def test_transformers_reads_it():
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(miniworld.path())
    assert auto("The capital of Norway is").input_ids == TOKENIZER.encode("The capital of Norway is").ids
    assert auto.bos_token_id == BOS_ID
    assert auto.eos_token_id == BOS_ID
    assert auto.pad_token_id == recipe.PAD_ID
    assert auto("x", add_special_tokens=False).input_ids == TOKENIZER.encode("x").ids[1:]
    batch = auto(["Mary", "Mary and John"], padding=True)
    assert batch["attention_mask"][0] == [0, 0, 1, 1]
