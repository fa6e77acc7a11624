"""Keyboard interrupts of a training run: held back until a step is whole, so that the run can be saved as it stands."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any


class Interrupts:
    """Handler of SIGINT: it stores the first signal, which `check` raises, and raises a second one at once.

    Attributes:
        asked: True once a signal has come.
        at_once: True while nothing is half done, so that a signal is raised when it comes.
    """

    def __init__(self) -> None:
        self.asked = self.at_once = False

    def __call__(self, *_: Any) -> None:
        if self.at_once or self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise the signal that was held back."""
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within the block, signals are raised at once: nothing is half done there."""
        self.check()
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False


@contextmanager
def held_back(on: bool = True) -> Iterator[Interrupts]:
    """Within the block, hold back interrupts; not in other threads, nor where the program has its own handler."""
    made = Interrupts()
    if not on or current_thread() is not main_thread() or signal.getsignal(signal.SIGINT) is not _USUAL:
        yield made
        return
    signal.signal(signal.SIGINT, made)
    try:
        yield made
    finally:
        signal.signal(signal.SIGINT, _USUAL)


_USUAL = signal.default_int_handler
