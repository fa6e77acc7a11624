"""Rows that come a few at a time, written as numbered files with their sums; corpora and codes lie on shelves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.core.files import write_tensors
from cutaway.streams.folders import about

Columns = dict[str, Tensor]


@dataclass
class Shelf:
    """Files of rows in one folder; a file is written as soon as `size` rows wait, whole batches in each.

    What waits is part of the notes of an interrupted run, so files end at the same rows whenever it was interrupted.

    Attributes:
        folder: where the files are.
        name: beginning of their names.
        size: least number of rows in a file but the last.
        arranged: makes the tensors of a file from the rows.
        files: name, rows, bytes and SHA-256 of each file that is written.
        waiting: rows that wait, by column.
    """

    folder: Path
    name: str
    size: int
    arranged: Callable[[Columns], Columns] = dict
    files: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[Columns] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Number of rows that wait."""
        return sum(len(next(iter(w.values()))) for w in self.waiting)

    def put(self, columns: Columns) -> None:
        """Take in rows."""
        self.waiting.append({n: t.cpu() for n, t in columns.items()})
        if self.rows >= self.size:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one file."""
        if not self.rows:
            return
        path, rows = self.folder / f"{self.name}-{len(self.files):05d}.safetensors", self.rows
        columns, self.waiting = self._joined(), []
        write_tensors(path, self.arranged(columns), {"kind": self.name})
        self.files.append(about(path) | {"rows": rows})

    def tensors(self) -> Columns:
        """Return what waits, with names of its own."""
        return {f"{self.name}/{n}": t for n, t in self._joined().items()} if self.rows else {}

    def restore(self, files: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        """Go back to where `files` and `tensors` were noted."""
        own = {n.removeprefix(f"{self.name}/"): t for n, t in tensors.items() if n.startswith(f"{self.name}/")}
        self.files, self.waiting = list(files), [own] if own else []

    def _joined(self) -> Columns:
        """Make one part of all that waits, a column at a time, so that rows are not held twice."""
        whole = {n: torch.cat([w.pop(n) for w in self.waiting]) for n in list(self.waiting[0])}
        self.waiting = [whole]
        return whole


def by_latent(latents: int) -> Callable[[Columns], Columns]:
    """Return what sorts entries of a code by latent, with the first entry of each; their places ascend as they come."""

    def arranged(rows: Columns) -> Columns:
        latent, order = rows.pop("latent").sort(stable=True)
        first = torch.searchsorted(latent, torch.arange(latents + 1, dtype=latent.dtype))
        del latent
        return {"first": first, **{n: rows.pop(n)[order] for n in ("place", "value")}}

    return arranged
