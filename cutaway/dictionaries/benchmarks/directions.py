"""Directions of true features: random unit vectors, pushed apart or exactly orthogonal."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.refuse import Refused
from cutaway.core.stats import rotation


def random_directions(features: int, d: int, g: torch.Generator) -> Float[Tensor, "feature d"]:
    """Independent directions, uniform on the sphere."""
    return normalize(torch.randn(features, d, generator=g), dim=-1)


def orthogonal_directions(features: int, d: int, g: torch.Generator) -> Float[Tensor, "feature d"]:
    """Exactly orthogonal directions, uniform otherwise.

    Raises:
        Refused: more features than dimensions.
    """
    if features > d:
        raise Refused(f"{features} orthogonal directions", f"there are only {d} dimensions", "raise d")
    return rotation(d, g, columns=features).T.contiguous()


def pushed_apart(
    directions: Float[Tensor, "feature d"], *, steps: int = 100, lr: float = 3e-4
) -> Float[Tensor, "feature d"]:
    """Return the directions after some Adam steps that lower their overlaps, normalised.

    The loss is Σ_{i≠j} (w_i·w_j)² + n Σ_i (w_i·w_i − 1)², as in SynthSAEBench. Its gradient needs the moment matrix
    WᵀW only: 4·(W WᵀW)_i − 4‖w_i‖² w_i + 4n(‖w_i‖² − 1) w_i, so a step costs 4·n·d² operations instead of 6·n²·d.
    """
    w = normalize(directions, dim=-1)
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, steps + 1):
        square = (w**2).sum(-1, keepdim=True)
        slope = 4 * (w @ (w.T @ w) - square * w + len(w) * (square - 1) * w)
        first.lerp_(slope, 0.1)
        second.lerp_(slope**2, 0.001)
        size = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
        w = w - lr / (1 - 0.9**step) * first / size
    return normalize(w, dim=-1)
