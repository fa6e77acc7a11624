"""Erasure of a binary concept from vectors: what a linear probe could read of it is taken out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

Eraser = Callable[[Float[Tensor, "text width"]], Float[Tensor, "text width"]]


def mean_projection(x: Float[Tensor, "text width"], z: Bool[Tensor, "text"]) -> Eraser:
    """Fit the projection onto what is orthogonal to the difference of the means with and without a concept."""
    centre, gap = x.mean(0), normalize(x[z].mean(0) - x[~z].mean(0), dim=0)
    return lambda new: new - ((new - centre) @ gap)[:, None] * gap


def leace(x: Float[Tensor, "text width"], z: Bool[Tensor, "text"]) -> Eraser:
    """Fit LEACE: the least change of x, in its own metric, after which no linear probe reads z better than a constant.

    x' = x − W⁻¹ P W (x − μ), W = Σ^(−1/2), P the projection onto W Σ_xz (Belrose et al. 2023, arXiv:2306.03819). Σ is
    shrunk (Ledoit & Wolf 2004), for there may be fewer texts than coordinates; the covariance of x' and z on these
    texts is zero with any Σ.
    """
    from sklearn.covariance import ledoit_wolf

    wide = x.double()
    centre, both = wide.mean(0), z.double() - z.double().mean()
    sigma = torch.from_numpy(ledoit_wolf(wide.numpy())[0])
    values, vectors = torch.linalg.eigh(sigma)
    root = values.clamp_min(values.max() * 1e-12).sqrt()
    whiten, colour = (vectors * scale @ vectors.T for scale in (1 / root, root))
    axis = normalize(whiten @ ((wide - centre).T @ both), dim=0)
    read, write = whiten @ axis, colour @ axis
    return lambda new: new - (((new.double() - centre) @ read)[:, None] * write).to(new)
