"""Weights of all layers under one name, and low-rank products that are never multiplied out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused


@dataclass(frozen=True)
class Factored:
    """A low-rank matrix left @ right that is never multiplied out: OV and QK circuits.

    Leading axes are a batch of such matrices: `model.weights.ov(9)` has one per head.
    """

    left: Float[Tensor, "*lead rows rank"]
    right: Float[Tensor, "*lead rank columns"]

    def __getitem__(self, index: Any) -> Factored:
        """Index the leading axes."""
        return Factored(self.left[index], self.right[index])

    @property
    def matrix(self) -> Float[Tensor, "*lead rows columns"]:
        """The product, formed on demand."""
        return self.left @ self.right

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U, S, Vh of the product at the cost of its rank (two QR factorisations)."""
        ql, rl = torch.linalg.qr(self.left.float())
        qr, rr = torch.linalg.qr(self.right.float().mT)
        u, s, vh = torch.linalg.svd(rl @ rr.mT)
        return ql @ u, s, vh @ qr.mT

    def norm(self) -> Float[Tensor, "*lead"]:
        """Return the Frobenius norm."""
        gram = (self.left.float().mT @ self.left.float()) @ (self.right.float() @ self.right.float().mT)
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64).to(gram.dtype)
        return trace.clamp_min(0).sqrt()

    @property
    def T(self) -> Factored:  # noqa: N802 (the transpose's own name)
        """The transpose."""
        return Factored(self.right.mT, self.left.mT)


@dataclass(frozen=True)
class PerLayer:
    """A weight of every layer, indexed like a tensor with the axis `layer` in front.

    `q[5]` is layer 5, a view of the model's own memory where its layout allows; `q[5, 1]` head 1 of it; `q[:]` and
    `q[2:6]` stack layers into a new tensor; iteration gives one layer after the other.

    Attributes:
        name: the name in refusals.
        n_layers: the number of layers.
        view: returns the weight of a layer.
    """

    name: str
    n_layers: int
    view: Callable[[int], Tensor]

    def __getitem__(self, index: int | slice | tuple[Any, ...]) -> Tensor:
        layer, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(layer, slice):
            found = torch.stack([self.view(i) for i in range(self.n_layers)[layer]])
            return found[(slice(None), *rest)] if rest else found
        found = self.view(within(layer, self.n_layers, f"weights.{self.name}", "layer"))
        return found[tuple(rest)] if rest else found

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.view, range(self.n_layers))

    def __len__(self) -> int:
        return self.n_layers


def within(index: Any, size: int, what: str, axis: str) -> int:
    """Return an index along an axis counted from 0; negative ones count from the end.

    Raises:
        Refused: it is not a whole number, or outside the axis.
    """
    if isinstance(index, bool) or not isinstance(index, int) or not -size <= index < size:
        raise Refused(f"{axis} {index!r} of {what}", "there is no such entry", f"use 0 to {size - 1}")
    return index % size
