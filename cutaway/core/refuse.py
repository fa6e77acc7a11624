"""Refusals: what was refused, why, and what to do instead."""

from __future__ import annotations


class Refused(Exception):
    """A request that cannot be answered truthfully.

    Every refusal names the thing refused (`what`, repeating the caller's own words), the reason (`why`) and a way
    out (`instead`). Command-line programs print it and leave with exit code 2. Nothing is lost when it is raised.
    """

    def __init__(self, what: str, why: str, instead: str):
        super().__init__(what, why, instead)
        self.what, self.why, self.instead = what, why, instead

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  instead: {self.instead}"

    def as_dict(self) -> dict[str, str]:
        """Return the refusal as JSON-ready data."""
        return {"what": self.what, "why": self.why, "instead": self.instead}


class OutOfMemory(Refused):
    """Work that does not fit in memory; smaller parts of it may."""


class NoTokens(Refused):
    """A source that ends before it gives any token."""


def nearest(word: str, known: object, n: int = 3) -> str:
    """Return the `n` known words most like `word`, joined for a message; empty if none is close."""
    from difflib import get_close_matches

    return ", ".join(get_close_matches(word, [str(k) for k in known], n=n, cutoff=0.5))  # type: ignore[attr-defined]
