"""Live progress of a training run."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A progress bar on stderr; plain lines where stderr is not a terminal.

    Attributes:
        console: stderr.
        live: the bar, shown within the `with` block.
    """

    def __init__(self, name: str):
        self.console = Console(stderr=True)
        said = TextColumn("{task.description}", markup=False)
        self.live = Progress(TextColumn(name), BarColumn(), said, TimeRemainingColumn(), console=self.console)
        self._task = self.live.add_task("", total=None, visible=False)

    def __enter__(self) -> Bar:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def show(self, done: int, total: int, unit: str, loss: str, tokens_per_second: float, seconds_left: float) -> None:
        """Show how much is done, and the loss in words (`loss 1.234`)."""
        amount, speed = f"{done:,}/{total:,} {unit}", f"{tokens_per_second:,.0f} tokens/s"
        said = f"{amount} · {loss} · {speed}"
        self.live.update(self._task, completed=done, total=total, description=said, visible=True)
        if not self.console.is_terminal:
            share = min(done / total, 1.0)  # the last batch may go over
            line = f"{amount} ({share:.0%}) · {loss} · {speed} · {seconds_left / 60:.1f} min left"
            self.console.print(line, soft_wrap=True)
