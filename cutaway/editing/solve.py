"""The one solver: a low-rank change of a linear map that gives new outputs for some keys and disturbs others little.

With keys K [inputs key] and wanted changes of their outputs R [outputs key], inputs first (y = kᵀW):

    Δ = M⁻¹K (KᵀM⁻¹K + c I)⁻¹ Rᵀ

* `Equality(C)`: M = C, c = 0. The keys get their outputs exactly, with the least E‖Δᵀk‖² over keys whose second moment
  is C (ROME for one key, EMMET for several).
* `Ridge(C, λ)`: M = C, c = λ. Minimises ‖R − ΔᵀK‖² + λ E‖Δᵀk‖² (MEMIT). As λ → 0 it becomes the equality.
* `NullSpace(P, λ, Kₚ)`: M⁻¹ = (P Kₚ Kₚᵀ P + λ I)⁻¹ P, c = 1. Keys outside the range of P get no change at all, and
  the outputs of earlier keys Kₚ little (AlphaEdit).

All in float64; the factors u [inputs key] and v [key outputs] are those of a `Rewrite`. Rearranged by the push-through
identity, so that only an [inputs inputs] system with as many right sides as keys is solved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused

Keys = Float[Tensor, "inputs key"]
Square = Float[Tensor, "inputs inputs"]
_LEAST = 0.1  # share of the inputs that a null space must have


class Constraint(ABC):
    """The protocol of a constraint: what a change may cost, and how exactly the keys are met."""

    @property
    @abstractmethod
    def slack(self) -> float:
        """The number c."""

    @abstractmethod
    def weighted(self, keys: Keys) -> Keys:
        """Return M⁻¹ K."""


@dataclass(frozen=True, eq=False)
class Equality(Constraint):
    """Keys that get their outputs exactly, at the least mean change of other keys.

    Attributes:
        second: the second moment C of keys.
    """

    second: Square

    @property
    def slack(self) -> float:
        return 0.0

    def weighted(self, keys: Keys) -> Keys:
        return torch.linalg.solve(self.second.double(), keys)


@dataclass(frozen=True, eq=False)
class Ridge(Constraint):
    """Keys whose outputs are weighed against the mean change of other keys.

    Attributes:
        second: the second moment C of keys.
        weight: the weight λ of the mean change.
    """

    second: Square
    weight: float

    @property
    def slack(self) -> float:
        return self.weight

    def weighted(self, keys: Keys) -> Keys:
        return torch.linalg.solve(self.second.double(), keys)


@dataclass(frozen=True, eq=False)
class NullSpace(Constraint):
    """Keys that are met only along directions which other keys do not use.

    Attributes:
        projection: P, symmetric with P² = P.
        weight: the weight λ of the size of the change.
        earlier: keys Kₚ of earlier edits, whose outputs shall stay; [inputs 0] for none.
    """

    projection: Square
    weight: float
    earlier: Keys

    @property
    def slack(self) -> float:
        return 1.0

    def weighted(self, keys: Keys) -> Keys:
        p, before = self.projection.double(), self.projection.double() @ self.earlier.double()
        eye = torch.eye(len(p), dtype=torch.double, device=p.device)
        return torch.linalg.solve(before @ before.T + self.weight * eye, p @ keys)


def solve(
    keys: Keys, wanted: Float[Tensor, "outputs key"], constraint: Constraint
) -> tuple[Float[Tensor, "inputs key"], Float[Tensor, "key outputs"]]:
    """Return the factors u and v of the change Δ = u v.

    Raises:
        Refused: keys that are dependent under an equality, so that no change meets them all.
    """
    k = keys.double()
    u = constraint.weighted(k)
    small = k.T @ u
    small = (small + small.T) / 2 + constraint.slack * torch.eye(small.shape[0], dtype=torch.double, device=k.device)
    condition = float(torch.linalg.cond(small))
    if not condition < 1e14:
        why = f"their {k.shape[1]} keys are dependent (condition number {condition:.1e})"
        raise Refused("edits that are met exactly", why, "leave out doubles, or use a ridge (MEMIT)")
    return u, torch.linalg.solve(small, wanted.double().T)


def regularised(second: Square, ridge: float) -> tuple[Square, float, float]:
    """Return C + ridge · mean(diag C) · I in float64, and the condition numbers of C and of that."""
    c = second.double()
    made = c + ridge * c.diagonal().mean() * torch.eye(len(c), dtype=torch.double, device=c.device)
    return made, float(torch.linalg.cond(c)), float(torch.linalg.cond(made))


def null_space(second: Square, energy: float) -> tuple[Square, int]:
    """Return the projection on the directions that hold at most the share `energy` of the trace of C, and their number.

    They are the last eigenvectors of C: the others, as few as possible, hold the share 1 − `energy`.

    Raises:
        Refused: fewer than a tenth of all directions.
    """
    values, vectors = torch.linalg.eigh(second.double())  # ascending
    share = values.clamp_min(0).cumsum(0) / values.clamp_min(0).sum()
    size = int((share <= energy).sum())
    if size < _LEAST * len(values):
        why = f"the directions with {energy:.2g} of the energy are {size} of {len(values)}"
        raise Refused("the null space of the keys", why, "give more energy to it, or use a ridge (MEMIT)")
    basis = vectors[:, :size]
    return basis @ basis.T, size
