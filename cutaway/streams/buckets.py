"""A true shuffle in bounded memory: rows go to random buckets on disk, then every bucket is permuted by itself.

Buckets drawn at random for each row, and a random order within each, make every order of all rows equally likely
(Sanders 1998). Memory holds one flush and one bucket, whatever the number of rows. What was flushed is known by the
lengths of the buckets, so a writer that was killed goes on from the last lengths that it noted down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Integer
from torch import Tensor

from cutaway.core.files import tensor_bytes
from cutaway.core.refuse import Refused
from cutaway.streams.order import drawn, permutation

MOST = 256
_AT_ONCE = 1 << 28  # bytes of permuted rows held at once


@dataclass(frozen=True)
class Column:
    """A tensor of each row: its name, width and dtype (width 0 is one number per row, without an axis)."""

    name: str
    width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes in a row."""
        return max(1, self.width) * self.dtype.itemsize


class Buckets:
    """Files of rows in a folder, filled at random."""

    def __init__(self, folder: Path, columns: Sequence[Column], lengths: list[int], seed: int):
        self.folder, self.columns, self.lengths, self.seed = folder, tuple(columns), list(lengths), seed
        self.row = sum(c.bytes for c in columns)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @property
    def pending(self) -> int:
        """Bytes not on disk yet."""
        return sum(rows.numel() for _, rows in self._waiting)

    def trim(self) -> None:
        """Cut the files to the noted lengths, to go on from there.

        Raises:
            Refused: a file is shorter than noted.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for b, length in enumerate(self.lengths):
            path = self._path(b)
            size = path.stat().st_size if path.exists() else 0
            if size < length * self.row:
                why = f"it has {size} bytes where {length * self.row} were written"
                raise Refused(f"file {str(path)!r}", why, "delete the folder and harvest anew")
            if size > length * self.row:
                with path.open("r+b") as f:
                    f.truncate(length * self.row)

    def put(self, place: int, tensors: Sequence[Tensor]) -> None:
        """Take rows, a tensor a column; `place` is the number by which their buckets are drawn."""
        parts = [_bytes(t, c) for t, c in zip(tensors, self.columns, strict=True)]
        rows = torch.cat(parts, 1)
        chosen = torch.randint(len(self.lengths), (len(rows),), generator=drawn(self.seed, "bucket", place))
        self._waiting.append((chosen, rows))

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        chosen = torch.cat([c for c, _ in self._waiting])
        rows = torch.cat([r for _, r in self._waiting])[chosen.argsort(stable=True)]
        counts = chosen.bincount(minlength=len(self.lengths)).tolist()
        self._waiting = []
        for b, part in enumerate(rows.split(counts)):
            if len(part):
                with self._path(b).open("ab") as f:
                    f.write(tensor_bytes(part))
                self.lengths[b] += len(part)

    def shuffled(self, first: int, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield all rows in random order from number `first` on, `size` at a time, as columns.

        Raises:
            Refused: a file is not as long as noted.
        """
        held: list[Tensor] = []
        for part in self._permuted(first):
            held.append(part)
            while sum(map(len, held)) >= size:
                rows = torch.cat(held) if len(held) > 1 else held[0]
                held = [rows[size:]]
                yield self._columns(rows[:size])
        if sum(map(len, held)):
            yield self._columns(torch.cat(held))

    def _permuted(self, first: int) -> Iterator[Tensor]:
        for b, length in enumerate(self.lengths):
            if first >= length:
                first -= length
                continue
            path, size = self._path(b), length * self.row
            if not path.exists() or path.stat().st_size != size:
                raise Refused(f"file {str(path)!r}", "it is not as it was written", "delete the folder, harvest anew")
            rows = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).view(length, self.row)
            for some in permutation(length, self.seed, "within", b)[first:].split(max(1, _AT_ONCE // self.row)):
                yield rows[some]
            first = 0

    def _columns(self, rows: Integer[Tensor, "row byte"]) -> dict[str, Tensor]:
        parts = rows.split([c.bytes for c in self.columns], 1)
        # A copy even where the part is contiguous already: its bytes may lie where no number of the dtype can begin.
        found = {
            c.name: torch.empty(p.shape, dtype=p.dtype).copy_(p).view(c.dtype)
            for c, p in zip(self.columns, parts, strict=True)
        }
        return {c.name: found[c.name] if c.width else found[c.name].squeeze(1) for c in self.columns}

    def _path(self, b: int) -> Path:
        return self.folder / f"bucket-{b:03d}"


def _bytes(t: Tensor, column: Column) -> Integer[Tensor, "row byte"]:
    t = t.detach().to("cpu", column.dtype).contiguous()
    return (t if column.width else t.unsqueeze(1)).view(torch.uint8)
