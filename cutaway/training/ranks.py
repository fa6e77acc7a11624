"""The protocol of processes that train one thing together."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Ranks(Protocol):
    """This process's place among several that train together, each with some rows of the larger tensors.

    An update that is spread over processes has one as `ranks`; the loop then lets the first process write the log and
    decide by its clock, and checkpoints are written by all.

    Attributes:
        rank: number of this process.
        device: where its tensors are.
        mesh: PyTorch's device mesh, replicas × shards of rows.
    """

    rank: int
    device: torch.device
    mesh: Any

    def broadcast(self, data: Any) -> Any:
        """Return the first process's JSON-ready data."""
        ...

    def wait(self) -> None:
        """Wait for all processes."""
        ...

    def number(self, n: int) -> int:
        """Return the sum of a number over the shards."""
        ...

    def bounds(self, n_rows: int, /) -> tuple[int, int]:
        """Return the first row held here, and the one after the last."""
        ...

    def splits(self, name: str, t: Tensor) -> bool:
        """True if a tensor of the checkpoint is split by rows; otherwise each process holds it whole."""
        ...
