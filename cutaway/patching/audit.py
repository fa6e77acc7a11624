"""How far an estimate can be trusted: exact effects at a sample of places, and how well the estimate agrees there.

The sample is spread evenly over the ranks of |estimate|, the largest and the smallest included, so that places an
estimate calls unimportant are looked at as often as others. Every estimate of this room is audited by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.stats import generator
from cutaway.models.executor import Variant, sweep
from cutaway.models.model import Model
from cutaway.patching.exchange import Exchange, measured

STATISTICS = ["pearson", "spearman", "sign errors"]
_DRAWS = 1000
_ROUNDING = 1e-5  # of the largest effect: below it neither ranks nor signs mean anything
_STEPS = 100  # as many rounding steps of the metric in the model's dtype


@dataclass(frozen=True)
class Audit:
    """Exact mean effects where they were measured (NaN elsewhere), and the agreement of the estimate with them."""

    exact: Float[Tensor, "node"]
    agreement: Float[Tensor, "statistic"]
    interval: Float[Tensor, "statistic bound"]
    chosen: tuple[int, ...]


def audit(
    model: Model,
    x: Exchange,
    variants: Sequence[Variant],
    estimate: Float[Tensor, "node"],
    n: int,
    size: Float[Tensor, "node"] | None = None,
) -> Audit:
    """Measure the effect of `n` of the variants exactly, spread over the ranks of `size` (by default |estimate|), and
    hold the estimate against it.
    """
    chosen = stratified(estimate.abs() if size is None else size, n)
    effects = (sweep(model, x.target, [variants[i] for i in chosen], measured(x.bound)) - x.baseline).float().cpu()
    exact = torch.full_like(estimate, torch.nan)
    exact[chosen] = effects.mean(-1)
    return Audit(exact, *agreement(estimate[chosen], exact[chosen], rounding(model, x)), tuple(chosen))


def rounding(model: Model, x: Exchange) -> float:
    """How large an effect can be by rounding alone."""
    return _STEPS * torch.finfo(model.dtype).eps * float(torch.stack([x.clean, x.corrupt]).abs().max())


def stratified(size: Float[Tensor, "node"], n: int) -> list[int]:
    """`n` indices at evenly spaced ranks of `size`, both ends included, in ascending order of index.

    Sizes that differ by rounding only count as equal, and equal ones keep their order.
    """
    grain = float(size.max()) * _ROUNDING
    order = (size / grain).round().argsort(stable=True) if grain else torch.arange(len(size))
    ranks = torch.linspace(0, len(size) - 1, min(n, len(size)) if n != 1 else 1).round().long()
    return sorted(order[len(size) - 1 - ranks].tolist())  # a sample of one is the largest


def agreement(
    estimate: Float[Tensor, "node"], exact: Float[Tensor, "node"], least: float = 0.0
) -> tuple[Float[Tensor, "statistic"], Float[Tensor, "statistic bound"]]:
    """Pearson and Spearman correlation and the share of sign errors, each with a 95 % bootstrap interval over places.

    Numbers up to `least` count as zero in ranks and signs. A place is a sign error if its exact effect is not zero and
    the estimate has another sign, or none.
    The resamples are the same in every audit (their source of chance is the audit's own).
    """
    a, b = estimate.double(), exact.double()
    draws = torch.randint(len(a), (_DRAWS, len(a)), generator=generator(0))
    least = max(least, float(b.abs().max()) * _ROUNDING)
    values, spread = _statistics(a[None], b[None], least)[0], _statistics(a[draws], b[draws], least)
    tails = torch.tensor([0.025, 0.975], dtype=torch.double)
    return values.float(), spread.nanquantile(tails, dim=0).T.float()


def _statistics(a: Tensor, b: Tensor, least: float) -> Float[Tensor, "draw statistic"]:
    u, v = (torch.where(t.abs() > least, t, 0.0) for t in (a, b))
    wrong = ((u.sign() != v.sign()) & (v != 0)).sum(-1) / (v != 0).sum(-1)
    return torch.stack([_pearson(a, b), _pearson(_ranks(u), _ranks(v)), wrong], dim=-1)


def _pearson(a: Tensor, b: Tensor) -> Float[Tensor, "draw"]:
    """Row by row; NaN where a row does not vary, or has fewer than three places."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    spread = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where((spread > 0) & (a.shape[-1] > 2), (a * b).sum(-1) / spread, torch.nan)


def _ranks(a: Float[Tensor, "draw node"]) -> Float[Tensor, "draw node"]:
    """Average ranks, row by row."""
    order = a.sort(-1).values
    below, upto = (torch.searchsorted(order, a.contiguous(), right=right) for right in (False, True))
    return (below + upto).double() / 2
