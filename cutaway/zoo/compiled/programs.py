"""The programs of the zoo: one row each, with the same in plain Python beside it.

Programs of one direction answer at every position, about the text so far. Those that need the whole text (reverse,
copy, sort) are asked behind an `=`, one word after another, as a language model says them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from cutaway.zoo.compiled.language import (
    Input,
    Mapped,
    Number,
    Taken,
    Variable,
    everything,
    indices,
    mapped,
    select,
    tokens,
)
from cutaway.zoo.compiled.program import Program

_LETTERS = tuple("abcdef")
_MOST = 8  # tokens of a prompt
_COUNTS = tuple(str(n) for n in range(_MOST + 1))
_YES, _NO = "yes", "no"


def _same(key: Any, query: Any) -> bool:
    return bool(key == query)


def _count(of: Input, word: str) -> Number:
    """Return how often a word has been said."""
    return select(of, None, lambda key, _: key == word).width(_MOST)


def _place_of(of: Input, mark: str, index: Input) -> Taken:
    """Return the index of a mark."""
    return select(of, None, lambda key, _: key == mark).take(index)


def _at(index: Input, place: Variable, values: Variable) -> Taken:
    """Return the value at an index that each position has computed."""
    return select(index, place, _same).take(values)


def _any(flag: Variable) -> Mapped:
    """Return True where a flag has been true at any position so far."""
    return mapped(lambda n: n > 0, select(flag, None, lambda key, _: key).width(_MOST))


# --- programs


def _successor() -> Variable:
    return mapped(lambda t: _LETTERS[(_LETTERS.index(t) + 1) % len(_LETTERS)], tokens(_LETTERS))


def _shift() -> Variable:
    index = indices(_MOST)
    return select(index, index, lambda key, query: key == query - 1).take(tokens(_LETTERS), "none")


def _induction() -> Variable:
    index, said = indices(7), tokens(_LETTERS)
    previous = select(index, index, lambda key, query: key == query - 1).take(said)
    return select(previous, said, _same).take(said, "none")


def _histogram() -> Variable:
    said = tokens(_LETTERS)
    return mapped(str, select(said, said, _same).width(_MOST))


def _dedupe() -> Variable:
    said = tokens(_LETTERS)
    first = mapped(lambda n: n == 1, select(said, said, _same).width(_MOST))
    return mapped(lambda new, t: t if new else "again", first, said)


def _frac_prevs() -> Variable:
    share = everything().mean({"a": 1}, tokens(_LETTERS[:3]), _MOST)
    return mapped(_quarters, share)


def _quarters(share: Fraction) -> str:
    return f"{int(4 * share)}/4"


def _majority() -> Variable:
    balance = everything().mean({"a": 1, "b": -1}, tokens(_LETTERS[:3]), _MOST)
    return mapped(lambda x: "a" if x > 0 else "b" if x < 0 else "tie", balance)


def _prefix_sum() -> Variable:
    mean = everything().mean({"1": 1, "2": 2}, tokens("012"), 6)
    return mapped(_sum, mapped(lambda x: x, mean), indices(6))


def _sum(mean: Fraction, n: int) -> str | None:
    return f"sum{int(mean * n)}" if (mean * n).denominator == 1 and mean <= 2 else None


def _parity() -> Variable:
    return mapped(lambda n: ("even", "odd")[n % 2], _count(tokens("01"), "1"))


def _balance() -> Variable:
    height = everything().mean({"(": 1, ")": -1}, tokens("()"), _MOST)
    sign = mapped(lambda x: (x > 0) - (x < 0), height)
    broken = _any(mapped(lambda s: s < 0, sign))
    return mapped(lambda bad, s: "broken" if bad else "open" if s else "closed", broken, sign)


def _most_frequent() -> Variable:
    said = tokens(_LETTERS[:3])
    counts = [mapped(lambda n, w=w: (w, n), _count(said, w)) for w in "abc"]
    better = mapped(_more, counts[0], counts[1])
    return mapped(lambda x, y: _more(x, y)[0], better, counts[2])


def _more(one: tuple[str, int], other: tuple[str, int]) -> tuple[str, int]:
    return other if other[1] > one[1] else one


def _reverse() -> Variable:
    return _answered(lambda end, here: 2 * end - here - 1)


def _copy() -> Variable:
    return _answered(lambda end, here: here - end + 1)


def _answered(place: Callable[[int, int], int]) -> Variable:
    """Return the word at a place that the index of `=` and the own one tell."""
    index, said = indices(_MOST), tokens((*_LETTERS, "="))
    end = _place_of(said, "=", index)
    target = mapped(lambda e, i: p if i >= e and 1 <= (p := place(e, i)) < e else None, end, index)
    return _at(index, target, said)


def _sort() -> Variable:
    said, order = tokens((*_LETTERS, "=")), ("=", *_LETTERS)
    best = len(order)
    rank = lambda key, query: best - order.index(key) if order.index(key) > order.index(query) else None  # noqa: E731
    return select(said, said, rank).take(said, ".")


def _palindrome() -> Variable:
    index, said = indices(_MOST), tokens((*_LETTERS[:3], "|"))
    mirror = mapped(lambda c, i: 2 * c - i if i >= c and 2 * c - i >= 1 else None, _place_of(said, "|", index), index)
    wrong = mapped(lambda there, here: there != here, _at(index, mirror, said), said)
    return mapped(lambda bad: _NO if bad else _YES, _any(wrong))


# --- the same in plain Python, and prompts


def _letters(words: Sequence[str]) -> Callable[[random.Random, int], list[str]]:
    return lambda rng, n: rng.choices(words, k=n)


def _repeating(rng: random.Random, n: int) -> list[str]:
    """Return different letters and then any letter, most often one of them that is followed by another."""
    said = rng.sample(_LETTERS, n - 1)
    return [*said, rng.choice(said[:-1] if rng.random() < 0.8 else _LETTERS)]


def _followed(said: list[str]) -> str | None:
    after = [b for a, b in pairwise(said) if a == said[-1]]
    return None if len(set(after)) > 1 else (after or ["none"])[0]


def _behind(answers: Callable[[list[str]], list[str]], end: str = "") -> Callable[[random.Random, int], list[str]]:
    """Return prompts of the form `letters = answers so far`."""

    def draw(rng: random.Random, n: int) -> list[str]:
        told = rng.randint(0, (n - 2) // 2)
        letters = rng.choices(_LETTERS, k=n - 1 - told)
        while len(answers(letters)) + bool(end) <= told:
            letters = rng.choices(_LETTERS, k=n - 1 - told)
        return [*letters, "=", *answers(letters)[:told]]

    return draw


def _next_of(answers: Callable[[list[str]], list[str]], end: str | None = None) -> Callable[[list[str]], str | None]:
    """Return the next word of the answers to what stands before the `=`."""

    def answer(said: list[str]) -> str | None:
        if "=" not in said:
            return None
        at = said.index("=")
        right, told = answers(said[:at]), len(said) - at - 1
        return right[told] if told < len(right) else end if told == len(right) else None

    return answer


def _nesting(said: list[str]) -> str:
    height = 0
    for t in said:
        height += 1 if t == "(" else -1
        if height < 0:
            return "broken"
    return "open" if height else "closed"


def _brackets(rng: random.Random, n: int) -> list[str]:
    """Return brackets, two times of three without a closing one too many."""
    out, height, sound = list[str](), 0, rng.random() < 2 / 3
    for i in range(n):
        closes = rng.random() < (0.75 if n - i <= height else 0.45) and (height > 0 or not sound)
        out.append(")" if closes else "(")
        height += -1 if closes else 1
    return out


def _mirrored(rng: random.Random, n: int) -> list[str]:
    """Return letters, a `|` and letters of which half the time all are those before it backwards."""
    half = rng.randint(n // 2, n - 2)
    first = rng.choices(_LETTERS[:3], k=half)
    back = first[::-1][: n - half - 1]
    if rng.random() < 0.5:
        at = rng.randrange(len(back))
        back[at] = rng.choice([w for w in _LETTERS[:3] if w != back[at]])
    return [*first, "|", *back]


def _mirrors(said: list[str]) -> str | None:
    if "|" not in said:
        return None
    at = said.index("|")
    back = said[at + 1 :]
    return None if len(back) > at else (_YES if back == said[:at][::-1][: len(back)] else _NO)


def _favourite(said: list[str]) -> str:
    counts = Counter(said)
    return max("abc", key=lambda w: (counts[w], -ord(w)))


def _lead(said: list[str]) -> str:
    by = said.count("a") - said.count("b")
    return "a" if by > 0 else "b" if by < 0 else "tie"


def _backwards(said: list[str]) -> list[str]:
    return said[::-1]


def _sorted(said: list[str]) -> list[str]:
    return sorted(set(said))


_ABC = _LETTERS[:3]
PROGRAMS: dict[str, Program] = {
    p.name: p
    for p in (
        Program("successor", "the letter after the last one, round and round", _LETTERS, _successor,
                lambda s: _LETTERS[(_LETTERS.index(s[-1]) + 1) % 6], _letters(_LETTERS)),
        Program("shift", "the letter before the last one", ("none", *_LETTERS), _shift,
                lambda s: s[-2] if len(s) > 1 else "none", _letters(_LETTERS)),
        Program("induction", "the letter that followed the last one before, or none", ("none", *_LETTERS), _induction,
                _followed, _repeating, longest=7),
        Program("histogram", "how often the last letter has been said", (*_COUNTS, *_LETTERS), _histogram,
                lambda s: str(s.count(s[-1])), _letters(_LETTERS[:4])),
        Program("dedupe", "the last letter if it is new, else again", ("again", *_LETTERS), _dedupe,
                lambda s: "again" if s[-1] in s[:-1] else s[-1], _letters(_LETTERS)),
        Program("frac_prevs", "the share of a among all letters, in quarters rounded down",
                (*(f"{n}/4" for n in range(5)), *_ABC), _frac_prevs,
                lambda s: f"{4 * s.count('a') // len(s)}/4", _letters(("a", "a", "b", "c"))),
        Program("majority", "the letter that has been said more often, a or b, or tie", ("tie", *_ABC), _majority,
                _lead, _letters(_ABC)),
        Program("prefix_sum", "the sum of all digits", (*(f"sum{n}" for n in range(13)), *"012"), _prefix_sum,
                lambda s: f"sum{sum(map(int, s))}", _letters("012"), longest=6),
        Program("parity", "even or odd, by the number of ones", ("even", "odd", *"01"), _parity,
                lambda s: ("even", "odd")[s.count("1") % 2], _letters("01")),
        Program("balance", "the state of the brackets: closed, open, or broken by one that closes nothing",
                ("closed", "open", "broken", *"()"), _balance, _nesting, _brackets),
        Program("most_frequent", "the letter that has been said most often, the first of those in a tie", _ABC,
                _most_frequent, _favourite, _letters(_ABC)),
        Program("reverse", "the letters before the = backwards", (*_LETTERS, "="), _reverse,
                _next_of(_backwards), _behind(_backwards)),
        Program("copy", "the letters before the = again", (*_LETTERS, "="), _copy,
                _next_of(list), _behind(list)),
        Program("sort_unique", "the letters before the = in order, each once, and a full stop", (".", *_LETTERS, "="),
                _sort, _next_of(_sorted, "."), _behind(_sorted, ".")),
        Program("palindrome", "yes while the letters behind the | are those before it backwards, else no",
                (_YES, _NO, *_ABC, "|"), _palindrome, _mirrors, _mirrored, shortest=5),
    )
}  # fmt: skip
