"""A slice of a batch: some prompts, without the columns that only longer ones need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cutaway.models.tokens import Tokens

_COLUMNS = ("position", "q_pos", "k_pos")


@dataclass(frozen=True, eq=False)
class BatchSlice:
    """Rows of a batch, and a range of its columns that holds all their tokens.

    Attributes:
        rows: the prompts, by their numbers in the whole batch.
        columns: the columns that are kept.
        shape: the size of the whole batch, [batch, position].
        taken: slices already taken, shared between edits that read the same capture.
    """

    rows: tuple[int, ...]
    columns: slice
    shape: tuple[int, int]
    taken: dict[Any, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(tokens: Tokens, rows: Sequence[int], trim: bool) -> BatchSlice:
        """Slice some prompts, with `trim` no wider than the longest of them."""
        width = tokens.ids.shape[1]
        long = int(tokens.mask[list(rows)].sum(1).max()) if trim else width
        low = width - long if tokens.side == "left" else 0
        return BatchSlice(tuple(rows), slice(low, low + long), (len(tokens), width))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def everything(self) -> bool:
        """True if it is the whole batch."""
        return len(self.rows) == self.shape[0] and self.width == self.shape[1]

    @property
    def width(self) -> int:
        """The number of columns that are left."""
        return self.columns.stop - self.columns.start

    def select(self, rows: Sequence[int]) -> BatchSlice:
        """Select some of its rows, by their numbers in the whole batch."""
        return replace(self, rows=tuple(rows), taken={})

    def tokens(self, whole: Tokens) -> Tokens:
        """Return the prompts as a batch of their own."""
        some = whole.rows(self.rows)
        return replace(some, ids=some.ids[:, self.columns], mask=some.mask[:, self.columns])

    def tensor(self, x: Tensor, axes: Sequence[str]) -> Tensor:
        """Slice a tensor that broadcasts to `axes` of the whole batch."""
        first = len(axes) - x.ndim
        for dim, axis in enumerate(axes[max(first, 0) :], max(-first, 0)):
            if axis == "batch" and x.shape[dim] == self.shape[0]:
                whole = len(self.rows) == self.shape[0]
                x = x if whole else x.index_select(dim, torch.tensor(self.rows, device=x.device))
            elif axis in _COLUMNS and x.shape[dim] == self.shape[1]:
                x = x.narrow(dim, self.columns.start, self.width)
        return x
