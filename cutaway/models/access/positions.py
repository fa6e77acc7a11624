"""The frame of a running forward: how columns of the batch correspond to positions of the prompts."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cutaway.models.tokens import Tokens


@dataclass
class Frame:
    """Set by the model around each forward; read by edits and taps.

    `offset` counts the columns already in the key-value cache, `width` those of the present forward. `roomy`: the cache
    has columns behind those, which hold nothing yet. `masks` are the additive attention masks made in it.
    """

    tokens: Tokens | None
    batch: int
    width: int
    offset: int = 0
    roomy: bool = False
    masks: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def whole(self) -> Frame:
        """The same forward with the columns of the cache in front: the frame of the keys."""
        return Frame(self.tokens, self.batch, self.offset + self.width)

    @property
    def generating(self) -> bool:
        """Whether the whole prompt lies in the cache."""
        return self.offset >= (self.tokens.ids.shape[1] if self.tokens is not None else 1)

    def filled(self, keys: int) -> int:
        """How many of a cache's `keys` columns hold something."""
        return min(keys, self.offset + self.width) if self.roomy else keys

    def hidden(self, keys: int) -> int:
        """How many of the oldest columns a sliding window has dropped, where `keys` are left."""
        return self.offset + self.width - keys

    def has(self, position: int) -> bool:
        """Whether every prompt has such a position, in this forward or another one over the same cache."""
        shortest = int(self.tokens.lengths.min()) if self.tokens is not None else 0
        return -shortest <= position < shortest

    def columns(self, position: int) -> int | Tensor | None:
        """The column of a prompt position in the present forward: one for all rows, or one per row (−1 where it is not
        part of it); None if it is part of it in no row (already in the cache, say, while generating)."""
        if self.tokens is None or not self.tokens.padded:
            length = self.tokens.ids.shape[1] if self.tokens is not None else self.width
            column = (position if position >= 0 else length + position) - self.offset
            return column if 0 <= column < self.width else None
        columns = self.tokens.column(position) - self.offset
        columns = torch.where((columns >= 0) & (columns < self.width), columns, -1)
        return None if bool((columns < 0).all()) else columns


FRAME: ContextVar[Frame | None] = ContextVar("cutaway_frame", default=None)


def real(x: Tensor) -> Tensor | None:
    """Where a tensor [batch, position, …] of the running forward holds tokens, or None if it holds no padding."""
    frame = FRAME.get()
    if frame is None or frame.tokens is None or not frame.tokens.padded:
        return None
    mask = frame.tokens.mask[:, frame.offset : frame.offset + frame.width]
    return mask.to(x.device) if mask.shape == x.shape[:2] else None


def rows(n: int, device: torch.device) -> Tensor:
    """0 … n − 1 on a device."""
    return torch.arange(n, device=device)
