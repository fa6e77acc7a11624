"""Continuations of a text by a word: joined to it, or after a space."""

from __future__ import annotations

import unicodedata
from typing import Any

from cutaway.core.refuse import Refused
from cutaway.core.text import check_encodable

_OPENS = frozenset("([{<“‘‚„«‹¿¡$£€¥@#_/\\~^")  # what comes next is usually joined to these
_SIDED = frozenset("\"'`*|")  # open a part of the text, or close it
_DASHES = frozenset("-‐‑–—−")
_STARTS = frozenset('"`([{<“‘‚„«‹¿¡$£€¥@#&+=<>~|*\\–—−')  # as an answer's first, these usually follow a space
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x10FFFF))  # Thai to Khmer, East Asia


def forms(prompt: str, answer: str, joined: bool = False) -> tuple[str, ...]:
    """Return the ways in which `answer` can follow `prompt`: what is written after it, the usual way first.

    There is one way between two words (a space), where either side brings white space of its own, and where `joined`
    says that the answer goes on with the last word. After or before a mark, between digits, and in scripts that write
    without spaces the text alone does not say: then there are two.
    """
    if joined or not prompt or not answer or answer[0].isspace() or prompt[-1].isspace():
        return (answer,)
    last = next((c for c in reversed(prompt) if not unicodedata.combining(c)), prompt[-1])
    first, spaced = answer[0], f" {answer}"
    if last.isalpha() and first.isalnum() and not _unspaced(last) and not _unspaced(first):
        return (spaced,)
    if first.isalnum():
        glued = (last.isdigit() and first.isdigit()) or _unspaced(first) or _unspaced(last) or _opens(prompt)
    else:
        glued = first not in _STARTS or _opens(prompt)
    return (answer, spaced) if glued else (spaced, answer)


def word_ids(tokenizer: Any, word: str) -> list[int]:
    """Return the tokens that `word` becomes after other words; a leading space is added where the tokenizer wants one.

    Raises:
        Refused: it is empty or not text, or the model has no tokenizer.
    """
    if not isinstance(word, str) or not word.strip():
        why = "there is nothing in it" if isinstance(word, str) else f"it is {type(word).__name__}, not text"
        raise Refused(f"word {word!r}", why, "give a word")
    if tokenizer is None:
        raise Refused(f"word {word!r}", "this model was loaded without a tokenizer", "give token ids")
    check_encodable(word, f"word {word!r}")
    # What the tokenizer makes of "a word" minus what it makes of "a".
    stem, joined, alone = (
        list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("a", "a" + forms("a", word)[0], word)
    )
    return joined[len(stem) :] if joined[: len(stem)] == stem else alone


def _opens(prompt: str) -> bool:
    """Return True if the mark at the end of a prompt usually joins the next word: it opens, or stands within a word."""
    mark = prompt[-1]
    before = prompt.rstrip(mark)[-1:]
    apart = not before or before.isspace()
    if mark in _SIDED:
        return apart or before in _OPENS
    if mark in _DASHES:
        return not apart
    if mark == "#":
        return apart or before in _OPENS  # in C# it ends a word
    return mark in _OPENS


def _unspaced(c: str) -> bool:
    return any(low <= ord(c) <= high for low, high in _UNSPACED)
