"""A prompt of a behaviour: clean and corrupt texts, answer and foil."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of a behaviour.

    `answer` continues `clean`, `foil` continues `corrupt` (and is the wrong answer of `clean`); both begin with the
    space they need and have the same number of tokens. `subject` is the character span in `clean` of what the
    corruption changes, where that is one place. `tail` is how a document goes on after the answer.
    """

    behaviour: str
    clean: str
    answer: str
    corrupt: str
    foil: str
    held_out: bool
    subject: tuple[int, int] | None = None
    tail: str = "."
    meta: dict[str, Any] = field(default_factory=dict)


def span(text: str, part: str) -> tuple[int, int]:
    """Return the character span of the last mention of `part` in `text`."""
    start = text.rindex(part)
    return start, start + len(part)


def other_than(rng: Random, items: Any, *avoid: Any) -> Any:
    """Draw one of the items, without those to avoid."""
    while True:
        item = rng.choice(items)
        if item not in avoid:
            return item
