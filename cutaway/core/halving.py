"""Run work in batches; refuse a batch that does not fit in memory, and halve it where that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from cutaway.core.refuse import Refused

S = TypeVar("S", bound=Sequence)  # type: ignore[type-arg]
T = TypeVar("T")


def ran_out(refusal: Refused) -> bool:
    """Whether memory was the reason of a refusal."""
    return "memory" in refusal.why


@contextmanager
def in_memory(what: str, instead: str = "use fewer prompts at once") -> Iterator[None]:
    """Within the block, memory that runs out is a refusal of `what`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise Refused(what, "the memory is not enough", instead) from error


def in_halves(items: Sequence[T], size: int, work: Callable[[Sequence[T]], object]) -> None:
    """`work` on `size` items at a time, in order, and on half as many where memory runs out.

    Raises:
        Refused: one item alone does not fit in memory, or what `work` refuses.
    """
    todo = [items[at : at + size] for at in range(0, len(items), max(1, size))]
    while todo:
        part = todo.pop(0)
        try:
            work(part)
        except Refused as refusal:
            if not ran_out(refusal) or len(part) == 1:
                raise
            half = len(part) // 2
            todo = [part[:half], part[half:], *todo]
