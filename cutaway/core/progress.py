"""Progress of long work: the code that does it calls `advance`, the code that shows it listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[float, float], None]  # (done, in all), in the worker's own units

_LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("cutaway_progress", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, `listener` is called with the progress of all work of this thread."""
    token = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


@contextmanager
def part(number: int, of: int) -> Iterator[None]:
    """Within the block, work is reported as part `number` (from 0) of `of` equal parts, so that one bar covers all."""
    before = _LISTENERS.get()

    def scaled(listener: Listener) -> Listener:
        return lambda done, total: listener(number + done / max(total, 1e-12), of)

    token = _LISTENERS.set(tuple(map(scaled, before)))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


def advance(done: float, total: float) -> None:
    """Report to the listeners that `done` of `total` units of work are finished."""
    for listener in _LISTENERS.get():
        listener(done, total)
