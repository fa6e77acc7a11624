"""Words of one kind: which word may stand for another, and what becomes of the answer if it does.

Three sorts: tables, whose rows belong together (a country, its capital and its language), series (days, numbers), and
plain sets (names). Two answers are alike if they share a kind, or where no kind is known, if they look alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cutaway.models.model import Model
from cutaway.models.tokens import known
from cutaway.tasks import program, words, world

_FUNCTION_WORDS = (
    "a an the and or but of in on at to from by with for as is are was were be been being am it its this that these "
    "those he she they we you i his her their our your my me him them us who what which when where while after before "
    "then so if not no do does did has have had will would can could may should there here"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


@dataclass(frozen=True)
class Kinds:
    """Kinds of words.

    Attributes:
        sets: sets of words of one kind.
        rows: tables, each as rows of words that belong together.
        series: words in their order.
    """

    sets: tuple[frozenset[str], ...]
    rows: tuple[tuple[tuple[str, ...], ...], ...]
    series: tuple[words.Series, ...]

    def of(self, *asked: str) -> list[dict[str, str]]:
        """Return the sets that hold all of some words, as lower case → word."""
        low = {w.strip().lower() for w in asked}
        maps = ({w.lower(): w for w in s} for s in self.sets)
        return [m for m in maps if low <= m.keys()]

    def alike(self, one: str, other: str) -> bool:
        """True if two answers are of one kind, or where the kind of the first is unknown, look alike."""
        if self.of(one):
            return bool(self.of(one, other))
        return _form(one) == _form(other)


def kinds_of(model: Model) -> Kinds:
    """Return the word tables of the house and of the model's world or program; of sets, the words that have tokens."""
    own: Any = getattr(model, "world", None)
    sets = [*words.kinds(mixed=False), *(world.kinds(own) if own is not None else [])]
    sets += program.kinds(model.program) if getattr(model, "program", None) is not None else []
    rows = [words.table("countries").rows, *([world.lands(own)] if own is not None else [])]
    return Kinds(tuple(_written(model, s) for s in sets), tuple(rows), words.series())


def _written(model: Model, kind: frozenset[str]) -> frozenset[str]:
    """Return the words that the tokenizer has tokens for, in their own case or in lower case."""
    named = sorted(kind)
    found = zip(named, *(known(model.tokenizer, [f(w) for w in named]) for f in (str, str.lower)), strict=True)
    return frozenset(w for w, own, lower in found if own or lower)


def cased(new: str, like: str) -> str:
    """`new` in the case of `like`."""
    if like.isupper() and len(like) > 1:
        return new.upper()
    return new[0].upper() + new[1:] if like[:1].isupper() else new.lower()


def _form(answer: str) -> tuple[bool, bool, bool, bool]:
    bare = answer.strip()
    return (
        bare.isdigit(),
        bare.replace("'", "").replace(" ", "").isalpha(),
        bare[:1].isupper(),
        bare.lower() in FUNCTION_WORDS,
    )
