"""Forwards that show activations to functions on the way, batch by batch, so that nothing of them need be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cutaway.core.address import Address
from cutaway.models.access import forward, taps
from cutaway.models.anatomy import rope
from cutaway.models.edits.edit import Edit
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens


def in_batches(model: Model, tokens: Tokens, size: int) -> Iterator[list[int]]:
    """Yield the rows of a batch that run together, at most `size` of them, and at least one."""
    size = max(1, size)
    for group in rope.apart(model.anatomy, tokens):
        yield from (group[i : i + size] for i in range(0, len(group), size))


def watched(
    model: Model, tokens: Tokens, sees: Mapping[Address, Callable[[Tensor], Tensor]], edits: Sequence[Edit] = ()
) -> None:
    """Run the model once under edits and show tensors to functions on the way."""
    with model.edited(*edits), torch.no_grad(), taps.attached(model.anatomy, sees):
        forward.streams(model.anatomy, tokens, 1.0)
