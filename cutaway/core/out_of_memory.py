"""Run work in batches, and halve a batch that does not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from cutaway.core.refuse import OutOfMemory

S = TypeVar("S", bound=Sequence)  # type: ignore[type-arg]
T = TypeVar("T")


@contextmanager
def raising_out_of_memory(what: str, instead: str = "use fewer prompts at once") -> Iterator[None]:
    """Within the block, an error of an allocator is a refusal of `what`.

    Raises:
        OutOfMemory: the memory is not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(what, "the memory is not enough", instead) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory ran out: in Python, on an accelerator or in torch on the CPU."""
    ours = isinstance(error, MemoryError | OutOfMemory) or type(error).__name__ == "OutOfMemoryError"
    return ours or "can't allocate memory" in str(error)


def in_halves(items: Sequence[T], size: int, work: Callable[[Sequence[T]], object]) -> None:
    """Call `work` on `size` items at a time, in order, and on half as many where memory runs out.

    Raises:
        Refused: one item alone does not fit in memory, or what `work` refuses.
    """
    todo = [items[at : at + size] for at in range(0, len(items), max(1, size))]
    while todo:
        part = todo.pop(0)
        try:
            work(part)
        except OutOfMemory:
            if len(part) == 1:
                raise
            half = len(part) // 2
            todo = [part[:half], part[half:], *todo]
