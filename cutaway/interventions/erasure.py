"""Erasure of concepts from vectors: affine maps, fitted on labelled vectors, that take out what probes read.

Every eraser is one map, x' = x − (x − centre) · read · write, of a few columns and rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.interventions.probes import logistic
from cutaway.models.edits.apply import Apply

Fit = Callable[[Float[Tensor, "text width"], Bool[Tensor, "text"]], "Eraser"]
_LEAST = 1e-6  # of the largest singular value: whitened covariances below it are rounding


@dataclass(frozen=True)
class Eraser:
    """The map x' = x − (x − centre) · read · write.

    Attributes:
        centre: the vector that stays as it is.
        read: what is read of a vector, in columns.
        write: what is taken out for each of them, in rows.
    """

    centre: Float[Tensor, "width"]
    read: Float[Tensor, "width rank"]
    write: Float[Tensor, "rank width"]

    def __call__(self, x: Float[Tensor, "*rest width"]) -> Float[Tensor, "*rest width"]:
        centre, read, write = (t.to(x.device) for t in (self.centre, self.read, self.write))
        return x - ((x.to(centre) - centre) @ read @ write).to(x)

    def edit(self, address: Address | str, positions: Sequence[int] | None = None) -> Apply:
        """Return the edit that erases at an address, for runs, generation and sweeps."""
        return Apply(address, self.__call__, None if positions is None else tuple(positions))


def projection(x: Float[Tensor, "text width"], z: Bool[Tensor, "text"]) -> Eraser:
    """Fit the projection onto what is orthogonal to the difference of the means with and without a concept."""
    gap = _gap(x, z)
    return Eraser(torch.zeros_like(gap), gap[:, None], gap[None])


def mean_projection(x: Float[Tensor, "text width"], z: Bool[Tensor, "text"]) -> Eraser:
    """Fit the affine projection, which sets the component along the difference of means to its mean over texts."""
    gap = _gap(x, z)
    return Eraser(x.double().mean(0), gap[:, None], gap[None])


def mean_ablation(x: Float[Tensor, "text width"], z: Bool[Tensor, "text"]) -> Eraser:
    """Fit the replacement of the whole vector by its mean over texts."""
    same = torch.eye(x.shape[1], dtype=torch.double)
    return Eraser(x.double().mean(0), same, same)


def rank_ablation(rank: int) -> Fit:
    """Return the fit that takes out `rank` directions, each of a logistic probe on what the earlier ones left.

    That is iterative null-space projection (Ravfogel et al. 2020, arXiv:2004.07667).
    """

    def fit(x: Float[Tensor, "text width"], z: Bool[Tensor, "text"]) -> Eraser:
        wide, basis = x.double(), torch.empty(x.shape[1], 0, dtype=torch.double)
        for _ in range(min(rank, x.shape[1])):
            left = wide - wide @ basis @ basis.T
            probe = logistic(left, z)
            along = torch.from_numpy(probe[-1].coef_[0] / probe[0].scale_)
            basis = torch.linalg.qr(torch.cat([basis, along[:, None]], 1)).Q
        return Eraser(wide.mean(0), basis, basis.T)

    return fit


def leace(
    x: Float[Tensor, "text width"],
    z: Bool[Tensor, "text"] | Float[Tensor, "text concept"],
    shrink: bool = True,
) -> Eraser:
    """Fit LEACE: the least change of x, in its own metric, after which no linear probe reads z better than a constant.

    x' = x − W⁺ P W (x − μ), W = Σ^(−1/2), P the projection onto the columns of W Σ_xz (Belrose et al. 2023,
    arXiv:2306.03819); z has a column per class or number where it is not one concept. With `shrink`, Σ is shrunk
    (Ledoit & Wolf 2004), for there may be fewer texts than coordinates; without, W is a pseudo-inverse. The covariance
    of x' and z on these texts is zero with a shrunk Σ too.
    """
    from sklearn.covariance import ledoit_wolf

    wide, labels = x.double(), z.double().reshape(len(x), -1)
    away, both = wide - wide.mean(0), labels - labels.mean(0)
    sigma = torch.from_numpy(ledoit_wolf(wide.numpy())[0]) if shrink else away.T @ away / len(x)
    values, vectors = torch.linalg.eigh(sigma)
    seen = values > values.max() * len(values) * torch.finfo(torch.double).eps
    root = values.clamp_min(0).sqrt()
    whiten, colour = (vectors * s @ vectors.T for s in (torch.where(seen, 1 / root, 0.0), root * seen))
    u, s, _ = torch.linalg.svd(whiten @ (away.T @ both), full_matrices=False)
    axes = u[:, s > _LEAST * s.max()]
    return Eraser(wide.mean(0), whiten @ axes, axes.T @ colour)


def _gap(x: Float[Tensor, "text width"], z: Bool[Tensor, "text"]) -> Float[Tensor, "width"]:
    """Return the difference of means, of length 1.

    Raises:
        Refused: the means are the same.
    """
    wide = x.double()
    gap = wide[z].mean(0) - wide[~z].mean(0)
    if not bool(gap.any()):
        raise Refused("erasure along a difference of means", "both classes have the same mean", "use another place")
    return normalize(gap, dim=0)


#: the ways to erase a concept, by name; the number of directions of `rank` is an option
ERASERS: dict[str, Callable[[int], Fit]] = {
    "projection": lambda rank: projection,
    "affine": lambda rank: mean_projection,
    "leace": lambda rank: leace,
    "rank": rank_ablation,
    "mean": lambda rank: mean_ablation,
}
