"""The frame of a running forward: how columns of the batch correspond to positions of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cutaway.models.tokens import Tokens


@dataclass(frozen=True)
class Tails:
    """Several continuations of each prompt in one forward.

    Attributes:
        hidden: True where one continuation would attend to another.
        origin: the column that each token would have without the continuations before its own.
        prompt: True at the columns of the prompt, and in padding.
    """

    hidden: Bool[Tensor, "batch query key"]
    origin: Int[Tensor, "batch query"]
    prompt: Bool[Tensor, "batch key"]


@dataclass
class ForwardFrame:
    """Positions of the prompts in one forward, or in the rows of one of its variants.

    The model sets it around each forward; ports read it, and every edit is given it. A batch of several variants has
    one frame per variant (`of_variant`), whose edits get that variant's rows alone.

    Attributes:
        tokens: the prompts; None in a forward that the user calls.
        batch: the rows that run.
        width: the columns of this forward.
        offset: the columns that are in the key-value cache already.
        roomy: True if the cache has columns behind those, which hold nothing yet.
        masks: the additive attention masks made in this forward.
        variant: the number of the variant among those of the batch.
        scratch: values that edits of this variant share within this forward, by keys of their own.
    """

    tokens: Tokens | None
    batch: int
    width: int
    offset: int = 0
    roomy: bool = False
    masks: dict[Any, Tensor] = field(default_factory=dict)
    variant: int = 0
    scratch: dict[Any, Any] = field(default_factory=dict)

    def of_variant(self, variant: int) -> ForwardFrame:
        """Return the frame of one variant's rows, with scratch of its own."""
        return replace(self, variant=variant, scratch={})

    @property
    def whole(self) -> ForwardFrame:
        """The frame of the keys: the same forward with the columns of the cache in front."""
        return ForwardFrame(self.tokens, self.batch, self.offset + self.width)

    def tails(self, device: torch.device) -> Tails | None:
        """Return what tells continuations of a prompt apart; None if there are not several."""
        if self.tokens is None or not any(len(t) > 1 for t in self.tokens.tails):
            return None
        key = ("tails", device)
        if key not in self.scratch:
            t, b = self.tokens, self.tokens.tail_of.to(device)
            hidden = (b[:, :, None] > 0) & (b[:, None] > 0) & (b[:, :, None] != b[:, None])
            front = t.column(0)[:, None] + t.position_ids
            origin = torch.where(t.mask, front, torch.arange(t.ids.shape[1], device=front.device)).to(device)
            self.scratch[key] = Tails(hidden, origin, b == 0)
        return self.scratch[key]

    @property
    def generating(self) -> bool:
        """True if the whole prompt lies in the cache."""
        return self.offset >= (self.tokens.ids.shape[1] if self.tokens is not None else 1)

    def filled(self, keys: int) -> int:
        """Count the columns that hold something, of the `keys` columns of a cache."""
        return min(keys, self.offset + self.width) if self.roomy else keys

    def hidden(self, keys: int) -> int:
        """Count the oldest columns that a sliding window has dropped, where `keys` are left."""
        return self.offset + self.width - keys

    def has(self, position: int) -> bool:
        """Return True if every prompt has this position, in this forward or another over the same cache."""
        shortest = self.tokens.shortest if self.tokens is not None else 0
        return -shortest <= position < shortest

    def columns(self, position: int) -> int | Tensor | None:
        """Return the column of a prompt position in this forward: one for all rows, or one per row (−1 where it is not
        part of it); None if it is part of it in no row (already in the cache, say, while generating)."""
        if self.tokens is None or not (self.tokens.padded or self.tokens.tails):
            length = self.tokens.ids.shape[1] if self.tokens is not None else self.width
            column = (position if position >= 0 else length + position) - self.offset
            return column if 0 <= column < self.width else None
        columns = self.tokens.column(position) - self.offset
        columns = torch.where((columns >= 0) & (columns < self.width), columns, -1)
        return None if bool((columns < 0).all()) else columns


FRAME: ContextVar[ForwardFrame | None] = ContextVar("cutaway_frame", default=None)


def real(x: Tensor) -> Tensor | None:
    """Return where a tensor [batch, position, …] of the running forward holds tokens; None if it has no padding."""
    frame = FRAME.get()
    if frame is None or frame.tokens is None or not frame.tokens.padded:
        return None
    mask = frame.tokens.mask[:, frame.offset : frame.offset + frame.width]
    return mask.to(x.device) if mask.shape == x.shape[:2] else None


def frame_of(x: Tensor, axes: Sequence[str], scratch: dict[Any, Any]) -> ForwardFrame:
    """Return the frame of the running forward; of one that the user calls, a frame of the tensor that passes there.

    `axes` are the axes of `x`. Nothing tells when the user's forwards begin, so they share one `scratch`.
    """
    if (frame := FRAME.get()) is not None:
        return frame
    columns = next((n for a, n in zip(axes, x.shape, strict=False) if a in ("position", "q_pos")), 1)
    return ForwardFrame(None, len(x), columns, scratch=scratch)


def rows(n: int, device: torch.device) -> Tensor:
    """Return 0 … n − 1 on a device."""
    return torch.arange(n, device=device)
