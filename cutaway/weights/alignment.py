"""Inner products of what components write and read, beside those of randomly rotated streams.

A side P is a Gram matrix [d_model, d_model] of trace 1, given as x C xᵀ. Of a random rotation Ω of n dimensions, the
mean of tr(P Ω Q Ωᵀ) is 1 / n, and its variance 2 (tr P² − 1/n) (tr Q² − 1/n) / ((n − 1)(n + 2)).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

Side = tuple[Tensor, Tensor | None]  # x [component, d_model, rank] and C [component, rank, rank], the identity if None
_ENTRIES = 1 << 24  # of Gram matrices at once, of all components of one side


def inner(one: Side, other: Side) -> Float[Tensor, "sender receiver"]:
    """Return tr P Q for every two Gram matrices, in blocks of their rows."""
    d = one[0].shape[1]
    size = max(1, _ENTRIES // (d * max(len(one[0]), len(other[0]))))
    total = one[0].new_zeros(len(one[0]), len(other[0]), dtype=torch.float64)
    for start in range(0, d, size):
        # The matrices are symmetric, so that entries right of the diagonal block count twice.
        rows = ((x[:, start : start + size], x[:, start:], core) for x, core in (one, other))
        p, q = ((a if core is None else a @ core) @ b.mT for a, b, core in rows)
        p[..., size:] *= 2
        total += (p.flatten(1) @ q.flatten(1).T).double()
    return total


def scale(one: Float[Tensor, "sender"], other: Float[Tensor, "receiver"], n: int) -> Float[Tensor, "sender receiver"]:
    """Return the standard deviation of tr(P Ω Q Ωᵀ) over rotations, from tr P² and tr Q² of every component."""
    spread = [(x - 1 / n).clamp_min(0) for x in (one, other)]
    return (spread[0][:, None] * spread[1] * 2 / ((n - 1) * (n + 2))).sqrt()


def percentiles(z: Float[Tensor, "pair"]) -> Float[Tensor, "bound"]:
    """Return the 2.5 and 97.5 percentiles; NaN of no values."""
    known = z[z.isfinite()].sort().values
    if not len(known):
        return torch.full((2,), math.nan)
    return known[torch.tensor([0.025, 0.975]).mul(len(known) - 1).round().long()]
