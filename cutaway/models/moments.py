"""Running moments of activations: one pass, float64, mergeable, so that parts seen apart give what the whole gives.

Count, mean, variance of each dimension, mean norm, and covariance if asked for, by the pairwise update of Chan, Golub &
LeVeque 1983 (Welford's for many rows at once): it does not cancel, however far the mean lies from zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Keyword, Refused
from cutaway.models.sweep.processes import processes


class Moments:
    """Moments of vectors of one width, updated by rows of them and by other moments."""

    def __init__(self, width: int, covariance: bool = False):
        self.width, self.with_covariance = width, covariance
        self.count = 0
        self.mean: Float[Tensor, "width"] = torch.zeros(width, dtype=torch.double)
        shape = (width, width) if covariance else (width,)
        self.spread: Tensor = torch.zeros(shape, dtype=torch.double)  # sums of products of deviations from the mean
        self.mean_norm = 0.0

    def update(self, x: Float[Tensor, "row width"]) -> Self:
        """Take in some vectors.

        Raises:
            Refused: vectors of another width.
        """
        if x.shape[-1] != self.width:
            raise Refused(
                f"vectors of width {x.shape[-1]}", f"these are moments of width {self.width}", "make new ones"
            )
        if len(x):
            y = x.detach().double()
            mean = y.mean(0)
            norm = float(torch.linalg.vector_norm(y, dim=1).mean())
            y = y - mean
            spread = y.T @ y if self.with_covariance else y.square().sum(0)
            self._take(len(x), mean.cpu(), spread.cpu(), norm)
        return self

    def merge(self, other: Moments) -> Self:
        """Take in what another object has seen.

        Raises:
            Refused: moments of another width, or without the covariance that these have.
        """
        if (other.width, other.with_covariance) != (self.width, self.with_covariance):
            raise Refused("moments of another kind", "width or covariance differ", "make both alike")
        if other.count:
            self._take(other.count, other.mean, other.spread, other.mean_norm)
        return self

    def _take(self, count: int, mean: Tensor, spread: Tensor, norm: float) -> None:
        total, apart = self.count + count, mean - self.mean
        both = torch.outer(apart, apart) if self.with_covariance else apart.square()
        self.spread = self.spread + spread + both * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.mean_norm += (norm - self.mean_norm) * (count / total)
        self.count = total

    @property
    def variance(self) -> Float[Tensor, "width"]:
        """Variance of each dimension (over the count, not one less)."""
        return (self.spread.diagonal() if self.with_covariance else self.spread) / max(1, self.count)

    @property
    def covariance(self) -> Float[Tensor, "width width"]:
        """Covariance matrix (over the count).

        Raises:
            Refused: it was not asked for.
        """
        if not self.with_covariance:
            raise Refused("covariance", "only variances were counted", ("count with ", Keyword("covariance", True)))
        return self.spread / max(1, self.count)

    @property
    def second(self) -> Float[Tensor, "width width"]:
        """Uncentred second moment E[x xᵀ] (what rank-one rewrites need)."""
        return self.covariance + torch.outer(self.mean, self.mean)

    @property
    def total_variance(self) -> float:
        """E‖x − mean‖²: the denominator of the fraction of variance unexplained."""
        return float(self.variance.sum())

    @property
    def scale(self) -> float:
        """√width / E‖x‖: what makes the mean norm √width."""
        return math.sqrt(self.width) / self.mean_norm if self.mean_norm > 0 else 1.0

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return everything as float64 tensors, for files; `from_tensors` gives back the same bits."""
        numbers = torch.tensor([float(self.count), self.mean_norm], dtype=torch.double)
        return {f"{prefix}numbers": numbers, f"{prefix}mean": self.mean, f"{prefix}spread": self.spread}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> Self:
        """Return the moments from what `tensors` gave."""
        numbers, mean, spread = (tensors[f"{prefix}{n}"] for n in ("numbers", "mean", "spread"))
        made = cls(len(mean), covariance=spread.ndim == 2)
        made.count, made.mean_norm, made.mean, made.spread = int(numbers[0]), float(numbers[1]), mean, spread
        return made

    def gathered(self, device: torch.device | str = "cpu") -> Moments:
        """Return the moments over all processes, the same in each; `device` is that of the process group."""
        whole = Moments(self.width, self.with_covariance)
        if processes() == 1:
            return whole.merge(self)
        own = torch.cat([t.reshape(-1) for t in self.tensors().values()]).to(device)
        parts = [torch.empty_like(own) for _ in range(processes())]
        dist.all_gather(parts, own)
        for part in parts:
            numbers, mean, spread = part.cpu().split([2, self.width, self.spread.numel()])
            named = {"numbers": numbers, "mean": mean, "spread": spread.view_as(self.spread)}
            whole.merge(Moments.from_tensors(named))
        return whole
