"""The causal inner product of an unembedding (Park et al. 2023, arXiv:2311.03658).

⟨a, b⟩ = aᵀ Cov(γ)⁻¹ b for directions a, b among unembedding rows γ. In it, concepts that can vary apart are orthogonal;
the product of the stored coordinates has no such meaning, for softmax leaves the basis free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.models.model import Model
from cutaway.models.moments import Moments

_ROWS = 8192
_RANK = 1e-10  # of the largest variance, below which there is none


@dataclass(frozen=True)
class CausalProduct:
    """The causal inner product of a model, as a change of basis in which it is the plain one.

    Attributes:
        rows: unembedding rows of all tokens.
        root: the root of the inverse of their covariance.
        rank: the number of dimensions in which they vary.
    """

    rows: Float[Tensor, "token d"]
    root: Float[Tensor, "d d"]
    rank: int

    @classmethod
    def of(cls, model: Model) -> CausalProduct:
        """Measure the covariance of a model's unembedding rows.

        Raises:
            Refused: no linear unembedding, or fewer than two tokens per dimension.
        """
        rows = model.weights.unembed.detach().T.float().cpu()
        n, d = rows.shape
        if n < 2 * d:
            why = f"{n} tokens in {d} dimensions: whitened, all are about equally far from each other"
            raise Refused(f"the causal inner product of {model.name}", why, "use a model with a larger vocabulary")
        moments = Moments(d, covariance=True)
        for first in range(0, n, _ROWS):
            moments.update(rows[first : first + _ROWS])
        values, vectors = torch.linalg.eigh(moments.covariance)
        kept = values > _RANK * values[-1]
        root = (vectors[:, kept] / values[kept].sqrt()) @ vectors[:, kept].T
        return cls(rows, root, int(kept.sum()))

    def whiten(self, x: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest d"]:
        """Return directions among unembedding rows in the basis in which the causal product is the plain one."""
        return x.double() @ self.root

    def steering(self, x: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest d"]:
        """Return the directions of the final stream that raise a concept alone, Cov(γ)⁻¹ x: orthogonal ones stay."""
        return x.double() @ self.root @ self.root
