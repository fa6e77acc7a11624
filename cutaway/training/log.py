"""The log of a training run: `log.jsonl` in its folder, and listeners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cutaway.core.json_lines import finite, written

OnLog = Callable[[dict[str, Any]], None]


class Log:
    """Lines of JSON, written by the main process.

    Attributes:
        path: the file; None keeps nothing.
        on_log: called with each line.
        is_main_process: False in all processes but the first, which stay silent.
        lines: how many lines there are.
    """

    def __init__(self, out: Path | None, on_log: OnLog | None = None, is_main_process: bool = True):
        self.path = None if out is None else out / "log.jsonl"
        self.on_log, self.is_main_process, self.lines = on_log, is_main_process, 0

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; numbers that are not finite become null in the file."""
        self.lines += 1
        if not self.is_main_process:
            return
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as f:
                f.write(written(finite(line)) + "\n")
        if self.on_log is not None:
            self.on_log(line)

    def cut(self, lines: int) -> None:
        """Keep the first lines only, as of a checkpoint."""
        if self.path is not None and self.is_main_process and (lines == 0 or self.path.is_file()):
            kept = self.path.read_text("utf-8").splitlines(keepends=True)[:lines] if lines else []
            self.path.write_text("".join(kept), encoding="utf-8")
        self.lines = lines
