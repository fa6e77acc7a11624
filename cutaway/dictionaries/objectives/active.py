"""Activations of a block on a batch, at the pairs it used or, where most latents are active, at all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from cutaway.dictionaries.kernels.sparse import Pairs
from cutaway.dictionaries.kernels.sparse_matmul import write

_ROWS = 64  # tokens of which all latents are looked at together, so that they stay in the cache


@dataclass(frozen=True, eq=False)
class Active:
    """Pre-activations and values of one block, [entry] at `pairs` or, if that is None, [token, latent].

    Formulas written with `at`, `by_latent` and `decode` serve both forms.
    """

    pre: Tensor
    value: Tensor
    pairs: Pairs | None
    tokens: int
    more: Mapping[str, Tensor] = field(default_factory=dict)  # what the gate's own loss needs

    def at(self, per_latent: Tensor) -> Tensor:
        """Return a number of each latent, where the values stand."""
        return per_latent if self.pairs is None else per_latent.index_select(0, self.pairs.index)

    def by_latent(self, numbers: Tensor, n_latents: int) -> Tensor:
        """Return the sum over tokens of numbers that stand where the values stand."""
        if self.pairs is None:
            return numbers.sum(0)
        return numbers.new_zeros(n_latents).index_add(0, self.pairs.index, numbers)

    def decode(self, numbers: Tensor, w: Tensor, tangent: bool = False) -> Tensor:
        """Return the sum over latents of numbers times rows of w."""
        if self.pairs is not None:
            return write(numbers, w, self.pairs, tangent)
        return numbers @ (w if not tangent else tangential(w))

    @cached_property
    def fires(self) -> Tensor:
        """On how many tokens each latent is active."""
        value = self.value.detach()
        if self.pairs is None:
            ones = torch.empty(min(_ROWS, len(value)), value.shape[1], device=value.device)  # exact, and quicker to add
            parts = [torch.ne(part, 0, out=ones[: len(part)]).sum(0) for part in value.split(_ROWS)]
            return torch.stack(parts).sum(0, dtype=torch.float64).long()
        return torch.bincount(self.pairs.index[value != 0], minlength=self.pairs.n_latents)

    def count(self) -> Tensor:
        """Return the number of active latents, over all tokens."""
        return self.fires.sum()


class _Tangential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w.view_as(w)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        (w,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad - w * (grad * w).sum(1, keepdim=True)


def tangential(w: Tensor) -> Tensor:
    """Return the same rows; their gradient loses its part along the row, for rows of norm one."""
    return _Tangential.apply(w)  # type: ignore[return-value]
