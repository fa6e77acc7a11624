"""Distributed alignment search: a subspace is trained so that exchanging it alone gives the counterfactual label.

R [width, rank] is orthonormal: the Q of a matrix that Adam changes (Geiger et al. 2023, arXiv:2303.02536). With a
learned boundary (Wu et al. 2023, arXiv:2305.08809) R is a whole rotation, of which the first b · width coordinates are
exchanged: each with the weight σ((b · width − j − ½) / T), where the temperature T falls from 50 to 0.1, and b itself
is a part of the loss. Every step sees all pairs, so that nothing is drawn and the curve of the loss has no noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.record import count
from cutaway.core.stats import rotation
from cutaway.interventions.interchange import Exchange
from cutaway.models.access.reading import Measure
from cutaway.models.dry import some

_TAIL = 0.2  # of the steps, whose slope tells if the fit converged
_STILL = 0.05  # of the whole fall of the loss: a tail that falls by less is level
_LEVEL = 0.01  # nats: so is one that falls by less than this
_WARM, _COLD = 50.0, 0.1  # temperatures, in coordinates
_BOUNDARY_RATE = 1e-2  # of Adam


@dataclass(frozen=True)
class Alignment:
    """A trained subspace.

    Attributes:
        basis: its orthonormal columns.
        loss: cross entropy of the labels before each step, in nats, mean over pairs.
        boundary: the share of coordinates within the boundary at each step; None without one.
    """

    basis: Float[Tensor, "width rank"]
    loss: Float[Tensor, "step"]
    boundary: Float[Tensor, "step"] | None

    @property
    def slope(self) -> float:
        """Slope of the loss over the last fifth of the steps, by least squares, in nats per step."""
        tail = self.loss[-self._tail :].double()
        x = torch.arange(len(tail)).double()
        x = x - x.mean()
        return float((x * tail).sum() / x.square().sum()) if len(tail) > 1 else 0.0

    @property
    def _tail(self) -> int:
        return max(2, round(_TAIL * len(self.loss)))

    @property
    def converged(self) -> bool:
        """True if the loss is level at the end: it falls there by less than 5 % of its whole fall, or 0.01 nats."""
        return -self.slope * self._tail <= max(_STILL * float(self.loss[0] - self.loss.min()), _LEVEL)


@torch.enable_grad()
def align(
    batches: Sequence[Exchange],
    labels: Measure,
    rank: int,
    steps: int,
    rate: float,
    g: torch.Generator,
    boundless: bool = False,
) -> Alignment:
    """Train a subspace; `labels` measures the log-probability of the counterfactual label.

    Args:
        rank: its dimensions; with `boundless` the boundary decides.
    """
    width, pairs = batches[0].step.shape[-1], sum(len(e.rows) for e in batches)
    raw = rotation(width, g, columns=width if boundless else rank).to(batches[0].step.device).requires_grad_(True)
    boundary = torch.tensor(0.5, device=raw.device, requires_grad=True)
    parameters = [raw, boundary] if boundless else [raw]
    rates = [{"params": [p], "lr": r} for p, r in zip(parameters, (rate, _BOUNDARY_RATE), strict=False)]
    optimiser = torch.optim.Adam(rates)
    losses, boundaries = list[float](), list[float]()
    for step in some(range(steps), 1):
        temperature = _WARM + (_COLD - _WARM) * step / max(steps - 1, 1)
        total = [torch.zeros_like(p) for p in parameters]
        loss = 0.0
        for e in batches:
            basis = orthonormal(raw)
            weighted = basis * _weights(boundary, width, temperature) if boundless else basis
            part = -e.measured(e.step @ weighted @ basis.T, labels).sum() / pairs
            total = [t + s for t, s in zip(total, torch.autograd.grad(part, parameters), strict=True)]
            count(backwards=len(e.rows))
            loss += float(part.detach())
        if boundless:
            total[1] = total[1] + 1.0  # the penalty is the boundary itself
        for p, slope in zip(parameters, total, strict=True):
            p.grad = slope
        losses.append(loss)
        boundaries.append(float(boundary.detach()))
        optimiser.step()
        with torch.no_grad():
            boundary.clamp_(1e-3, 1.0)
    basis = orthonormal(raw.detach())
    kept = max(1, round(float(boundary.detach()) * width)) if boundless else rank
    curve = [torch.tensor(v + v[-1:] * (steps - len(v))) for v in (losses, boundaries)]
    return Alignment(basis[:, :kept].cpu().contiguous(), curve[0], curve[1] if boundless else None)


def orthonormal(raw: Float[Tensor, "width rank"]) -> Float[Tensor, "width rank"]:
    """Return orthonormal columns with the span of the first ones of a matrix, whatever their number."""
    q, r = torch.linalg.qr(raw)
    return q * r.diagonal().sign()


def _weights(boundary: Tensor, width: int, temperature: float) -> Float[Tensor, "width"]:
    place = torch.arange(width, device=boundary.device) + 0.5
    return ((boundary * width - place) / temperature).sigmoid()
