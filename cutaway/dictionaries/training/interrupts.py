"""An interruption from the keyboard waits until a step is whole, so that the run can be saved as it stands."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any


class Interrupts:
    """What SIGINT does meanwhile: it is noted down, and raised by `check`; a second one is raised at once."""

    def __init__(self) -> None:
        self.asked = self.at_once = False

    def __call__(self, *_: Any) -> None:
        if self.at_once or self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise what was put off."""
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let interruptions through: nothing is half done here."""
        self.check()
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False


@contextmanager
def put_off(on: bool = True) -> Iterator[Interrupts]:
    """Put off interruptions while open; in other threads, and where a program has a handler of its own, nothing is."""
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
