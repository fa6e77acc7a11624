"""The rules of the miniworld that are no lists of facts: which word must follow a sentence, and by which rule."""

from __future__ import annotations

import re
from collections import Counter

from cutaway.zoo.miniworld import words

_SUM = re.compile(r"(\d+)\s*([+-])\s*(\d+)\s*=\s*(\d*)$")
_SERIES = (words.DAYS, words.MONTHS, words.NUMBER_WORDS, words.ORDINALS, words.LETTERS)
_AFTER = re.compile(r"after (\w+) comes$")


def follows(sentence: str) -> tuple[str, str] | None:
    """Return the next word (of a sum, its next digit) and the rule that says so; None if no rule speaks of the
    sentence.
    """
    text = sentence.strip().lower()
    return _indirect_object(text) or _sum(text) or _successor(text)


def _indirect_object(text: str) -> tuple[str, str] | None:
    said = Counter(w for w in re.findall(r"\w+", text) if w in words.NAMES)
    if sorted(said.values()) != [1, 2] or not text.endswith(" to"):
        return None
    once = min(said, key=lambda name: said[name])
    twice = max(said, key=lambda name: said[name])
    return once, f"{twice.capitalize()} acts, so {once.capitalize()}, named once, receives"


def _sum(text: str) -> tuple[str, str] | None:
    found = _SUM.search(text)
    if found is None:
        return None
    a, sign, b, given = int(found[1]), found[2], int(found[3]), found[4]
    total = str(a + b if sign == "+" else a - b)
    if not total.startswith(given) or total == given or total.startswith("-"):
        return None
    return total[len(given)], f"{a} {sign} {b} = {total}"


def _successor(text: str) -> tuple[str, str] | None:
    found = _AFTER.search(text)
    if found is None:
        return None
    for series in _SERIES:
        if found[1] in series[:-1] or (found[1] in series and series in (words.DAYS, words.MONTHS)):
            following = series[(series.index(found[1]) + 1) % len(series)]
            return following, f"{following.capitalize()} follows {found[1].capitalize()}"
    return None
