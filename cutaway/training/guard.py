"""The guard against losses that are not finite: such a step is skipped, and too many in a row end the training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from cutaway.core.refuse import Refused

PATIENCE = 3  # steps in a row whose loss is not finite


@runtime_checkable
class Notes(Protocol):
    """A log that takes events."""

    def note(self, event: str, **more: Any) -> None:
        """Log an event."""
        ...


@dataclass
class Guard:
    """Count of steps in a row that were skipped because the loss was not finite.

    An update asks `passes` before it changes anything, and skips the step if the answer is False.

    Attributes:
        lost: steps in a row without an update.
    """

    lost: int = 0

    def passes(self, finite: bool, log: Notes, **about: Any) -> bool:
        """True if the loss is finite; otherwise log the step, with what is said about it, and count it."""
        self.lost = 0 if finite else self.lost + 1
        if not finite:
            log.note("loss is not a number", **about)
        return finite

    @property
    def spent(self) -> bool:
        """True after too many skipped steps in a row."""
        return self.lost >= PATIENCE

    def check(self, what: str, instead: str) -> None:
        """Refuse to go on if the guard is spent."""
        if self.spent:
            raise Refused(what, f"the loss was no number {PATIENCE} times in a row", instead)
