"""Search in text regardless of case and accents, and checks that a text can be encoded."""

from __future__ import annotations

import re
import unicodedata

from cutaway.core.refuse import Refused

_ACCENTS = "".join(map(chr, range(0x300, 0x370)))
_LONE = re.compile("[\ud800-\udfff]")


def occurrences(text: str, phrase: str) -> list[tuple[int, int]]:
    """Find the occurrences of `phrase` in `text` as (start, end) of the text as written, the likeliest first.

    Case, and the way accents are composed, make no difference. Whole words go before parts of words, equal case before
    another; among equals the order is that of the text.
    """
    letters, owners = _folded(text)
    wanted, _ = _folded(phrase)
    if not wanted:
        return []
    found, at = [], letters.find(wanted)
    while at >= 0:
        end = at + len(wanted)
        # A match ends where characters of the text end: the s of ß, or the e of é, does not match.
        if (at == 0 or owners[at] != owners[at - 1]) and (end == len(owners) or owners[end] != owners[end - 1]):
            found.append((owners[at][0], owners[end - 1][1]))
        at = letters.find(wanted, at + 1)
    as_written = unicodedata.normalize("NFC", phrase)

    def rank(place: tuple[int, int]) -> tuple[bool, bool]:
        return not _whole(text, *place), unicodedata.normalize("NFC", text[slice(*place)]) != as_written

    return sorted(found, key=rank)


def lone_surrogate(text: str) -> str | None:
    """Return the first lone half of a surrogate pair, escaped; None if the text can be encoded."""
    if text.isascii():
        return None
    found = _LONE.search(text)
    return None if found is None else f"\\u{ord(found[0]):04x}"


def check_encodable(text: str, what: str) -> None:
    """Refuse a text that cannot be encoded because it holds half of a surrogate pair.

    Raises:
        Refused: it has one; `what` names the text.
    """
    if (half := lone_surrogate(text)) is not None:
        why = f"it holds {half}, half of a character's surrogate pair, which no tokenizer can read"
        raise Refused(what, why, "put the whole character there, or U+FFFD")


def _folded(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without case, accents apart; and for each of its characters the part of `text` that it comes
    from.
    """
    if text.isascii():
        return text.lower(), [(i, i + 1) for i in range(len(text))]
    starts = [i for i, c in enumerate(text) if i == 0 or not unicodedata.combining(c)]
    letters, owners = list[str](), list[tuple[int, int]]()
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        apart = unicodedata.normalize("NFD", text[start:end])
        made = unicodedata.normalize("NFD", apart.casefold()).replace("i\u0307", "i")  # İ is an i
        letters.append(made)
        owners += [(start, end)] * len(made)
    return "".join(letters), owners


def _whole(text: str, start: int, end: int) -> bool:
    """Return True if neither end cuts a word."""

    def joined(at: int) -> bool:
        before = text[:at].rstrip(_ACCENTS) if at and unicodedata.combining(text[at - 1]) else text[:at]
        return at < len(text) and before[-1:].isalnum() and text[at].isalnum()

    return not joined(start) and not joined(end)
