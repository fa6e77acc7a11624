"""Sparse kernels: products of a sparse code with dense rows, in plain PyTorch operations.

A code of `token` rows and `n_latents` columns is held as `Pairs` (which latent on which token) and one value a pair.
Four products are all that training needs, and each costs `entry · d`:

- `dots`: x[token] · W[latent] for every pair, the code's values and their gradients
- `mix`: Σ over a token's pairs of value · W[latent], decoding
- `spread`: Σ over a latent's pairs of value · dense[token], gradients of weights (the transpose of `mix`)
- `total`: Σ over a latent's pairs of value, gradients of biases

Pairs are visited in the order of latents where that is quicker, because then a row of W stays in the cache. All have a
slow twin in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

_ROWS_AT_ONCE = 1 << 13  # pairs that the fallback of `dots` gathers together


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which latents are active on which tokens: `index[indptr[t]:indptr[t + 1]]` are those of token t."""

    index: Int[Tensor, "entry"]
    indptr: Int[Tensor, "tokens_and_end"]
    n_latents: int

    @staticmethod
    def fixed(index: Int[Tensor, "token k"], n_latents: int) -> Pairs:
        """Return the pairs of a code that has the same number of entries on every token."""
        n, k = index.shape
        return Pairs(index.reshape(-1), torch.arange(n + 1, device=index.device) * k, n_latents)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @cached_property
    def token(self) -> Int[Tensor, "entry"]:
        """The token of each pair."""
        at = torch.arange(len(self), device=self.index.device)
        return at.repeat_interleave(self.indptr.diff(), output_size=len(self.index))

    @cached_property
    def order(self) -> Int[Tensor, "entry"]:
        """The pairs in the order of latents, and of tokens within a latent."""
        return torch.argsort(self.index, stable=True)

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, "entry"], Int[Tensor, "entry"], Int[Tensor, "latents_and_end"]]:
        """Token and latent of each pair in the order of latents, and where each latent begins."""
        counts = torch.bincount(self.index, minlength=self.n_latents)
        starts = torch.zeros(self.n_latents + 1, dtype=torch.int64, device=self.index.device)
        torch.cumsum(counts, 0, out=starts[1:])
        return self.token[self.order], self.index[self.order], starts

    def split(self, widths: tuple[int, ...]) -> tuple[Pairs, Int[Tensor, "entry"]]:
        """Return the same pairs as rows (token, group), where `widths` cuts the latents into groups, and their new
        order.

        Group g holds the latents from widths[g-1] up to widths[g]; row t · groups + g of the answer is token t.
        """
        edges = torch.tensor(widths, device=self.index.device)
        group = torch.bucketize(self.index, edges, right=True)
        row = self.token * len(widths) + group
        order = torch.argsort(row, stable=True)
        indptr = torch.zeros(len(self) * len(widths) + 1, dtype=torch.int64, device=self.index.device)
        torch.cumsum(torch.bincount(row, minlength=len(indptr) - 1), 0, out=indptr[1:])
        return Pairs(self.index[order], indptr, self.n_latents), order


def dots(x: Float[Tensor, "token d"], w: Float[Tensor, "latent d"], pairs: Pairs) -> Float[Tensor, "entry"]:
    """Return the dot product x[token] · w[latent] of every pair."""
    token, latent, _ = pairs.by_latent
    out = torch.empty(len(latent), dtype=x.dtype, device=x.device)
    out[pairs.order] = row_dots(x, w, token, latent)
    return out


def row_dots(
    x: Float[Tensor, "row d"], w: Float[Tensor, "other d"], rows: Int[Tensor, "entry"], others: Int[Tensor, "entry"]
) -> Float[Tensor, "entry"]:
    """Return the dot product x[rows[e]] · w[others[e]] for every e, without gathering rows where PyTorch has the
    kernel.
    """
    if len(rows) == 0:
        return x.new_zeros(0)
    if has_twins(x.device.type, x.dtype):
        return _twins().row_dots(x, w, rows, others)
    if has_row_dots(x.device.type, x.dtype):
        return _row_dots_kernel(x.contiguous(), w.contiguous(), rows, others)
    return _row_dots_gathered(x, w, rows, others)


@cache
def has_row_dots(device: str, dtype: torch.dtype) -> bool:
    """Return True if PyTorch's own kernel for gathered dot products, which is private, exists and is right."""
    x, w = (torch.arange(n, device=device).remainder(7).to(dtype).reshape(-1, 8) for n in (24, 40))
    rows, others = (torch.tensor(i, device=device) for i in ([0, 2, 1, 2, 0], [4, 0, 3, 1, 4]))
    try:
        got = _row_dots_kernel(x, w, rows, others)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool(torch.equal(got, _row_dots_gathered(x, w, rows, others)))


@cache
def has_twins(device: str, dtype: torch.dtype) -> bool:
    """Return True if the Triton kernels can be used: on a GPU, with Triton, where they agree with PyTorch."""
    if device != "cuda" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    twins = _twins()
    try:
        return twins.triton is not None and agree(twins, device, dtype)
    except RuntimeError:
        return False


def agree(twins: Any, device: str, dtype: torch.dtype) -> bool:
    """Return True if the kernels' twins agree with PyTorch on a small example with an empty bag."""
    x, w = (torch.arange(n, device=device).remainder(7).to(dtype).reshape(-1, 150) for n in (450, 750))
    rows, others = (torch.tensor(i, device=device) for i in ([0, 0, 1, 2, 2], [4, 0, 3, 1, 4]))
    starts, value = torch.tensor([0, 2, 2, 5], device=device), torch.tensor([1, 2, 0, 3, 1], device=device).to(dtype)
    dots_agree = torch.allclose(twins.row_dots(x, w, rows, others), _row_dots_gathered(x, w, rows, others), rtol=1e-2)
    sums = embedding_bag(others, w, starts, mode="sum", per_sample_weights=value, include_last_offset=True)
    return bool(dots_agree and torch.allclose(twins.bags(others, value, w, starts), sums, rtol=1e-2))


def _twins() -> Any:
    from cutaway.dictionaries.kernels import triton_kernels as twins

    return twins


def _row_dots_kernel(x: Tensor, w: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    # the gradient of embedding_bag by its weights is x[bag] · w[index]; the offsets themselves are not read
    offsets = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(x, w, others, offsets, rows, 0, -1)


def _row_dots_gathered(x: Tensor, w: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    parts = zip(rows.split(_ROWS_AT_ONCE), others.split(_ROWS_AT_ONCE), strict=True)
    return torch.cat([torch.bmm(x[r].unsqueeze(1), w[o].unsqueeze(2)).reshape(-1) for r, o in parts])


def mix(pairs: Pairs, value: Float[Tensor, "entry"], w: Float[Tensor, "latent d"]) -> Float[Tensor, "token d"]:
    """Return the sum of value · w[latent] over the pairs of each token."""
    return _bags(pairs.index, value, w, pairs.indptr)


def spread(pairs: Pairs, value: Float[Tensor, "entry"], dense: Float[Tensor, "token d"]) -> Float[Tensor, "latent d"]:
    """Return the sum of value · dense[token] over the pairs of each latent."""
    token, _, starts = pairs.by_latent
    return _bags(token, value[pairs.order], dense, starts)


def total(pairs: Pairs, value: Float[Tensor, "entry"]) -> Float[Tensor, "latent"]:
    """Return the sum of the values of each latent, added in float64."""
    sums = torch.zeros(pairs.n_latents, dtype=torch.float64, device=value.device)
    return sums.index_add_(0, pairs.index, value.double()).to(value.dtype)


def _bags(index: Tensor, value: Tensor, w: Tensor, starts: Tensor) -> Tensor:
    if len(index) == 0:
        return w.new_zeros(len(starts) - 1, w.shape[1])
    if has_twins(w.device.type, w.dtype):
        return _twins().bags(index, value, w, starts)
    return embedding_bag(index, w, starts, mode="sum", per_sample_weights=value, include_last_offset=True)
