"""Progress of long work: whoever does it says how far it is, whoever shows it listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[float, float], None]  # (done, in all), in the worker's own units

_LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("cutaway_progress", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While open, `listener` is told about all work of this thread."""
    token = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


@contextmanager
def part(number: int, of: int) -> Iterator[None]:
    """While open, work is told as part `number` (from 0) of `of` equal parts, so that a bar runs once over all."""
    before = _LISTENERS.get()

    def told(listener: Listener) -> Listener:
        return lambda done, total: listener(number + done / max(total, 1e-12), of)

    token = _LISTENERS.set(tuple(map(told, before)))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


def advance(done: float, total: float) -> None:
    """Say how far the work is."""
    for listener in _LISTENERS.get():
        listener(done, total)
