"""Refusals: what was refused, why, and what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Keyword:
    """An option named in a refusal: `window=1` in Python, a flag at the command line.

    Attributes:
        name: the keyword.
        value: its value; `...` names the option alone.
        of: the subject whose option it is (`model`, `task`), if it is not one of the call itself.
    """

    name: str
    value: Any = ...
    of: str = ""

    def __str__(self) -> str:
        return f"{self.name}={'…' if self.value is ... else repr(self.value)}"


@dataclass(frozen=True)
class Call:
    """A call named in a refusal, with options: `activation(window=3)` in Python, flags at the command line."""

    function: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(str(k) for k in self.keywords())})"

    def keywords(self) -> list[Keyword]:
        """Return the options, one keyword each."""
        return [Keyword(name, value) for name, value in self.options.items()]


@dataclass(frozen=True)
class Code:
    """Words that only make sense in Python; the command line has others for them (`cli.words`)."""

    text: str

    def __str__(self) -> str:
        return self.text


Word = Keyword | Call | Code
#: a part of a refusal: a text, or texts and words that each shell says in its own way
Words = str | Word | tuple["str | Word", ...]


class Refused(Exception):
    """A request that cannot be answered truthfully.

    Every refusal names the thing refused (`what`, repeating the caller's own words), the reason (`why`) and a way
    out (`instead`). Command-line programs print it and leave with exit code 2. Nothing is lost when it is raised.

    Attributes:
        what: the thing refused, as Python says it.
        why: the reason.
        instead: the way out.
    """

    def __init__(self, what: Words, why: Words, instead: Words):
        super().__init__(what, why, instead)
        self.what, self.why, self.instead = ("".join(map(str, _parts(words))) for words in (what, why, instead))

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  instead: {self.instead}"

    def said(self, word: Callable[[Word], str | Word]) -> Refused:
        """Return the same refusal with each keyword, call and piece of code replaced by what `word` makes of it."""
        return Refused(*(tuple(p if isinstance(p, str) else word(p) for p in _parts(w)) for w in self.args))

    def as_dict(self) -> dict[str, str]:
        """Return the refusal as JSON-ready data."""
        return {"what": self.what, "why": self.why, "instead": self.instead}


def _parts(words: Words) -> tuple[str | Word, ...]:
    return words if isinstance(words, tuple) else (words,)


class OutOfMemory(Refused):
    """Work that does not fit in memory; smaller parts of it may."""


class NoTokens(Refused):
    """A source that ends before it gives any token."""


def nearest(word: str, known: object, n: int = 3) -> str:
    """Return the `n` known words most like `word`, joined for a message; empty if none is close."""
    from difflib import get_close_matches

    return ", ".join(get_close_matches(word, [str(k) for k in known], n=n, cutoff=0.5))  # type: ignore[attr-defined]
