"""How far an estimate can be trusted: exact effects at a sample of places, and how well the estimate agrees there.

The sample is stratified: one place of each of as many strata as it has places, which lie evenly over the ranks of
|estimate|, the largest and the smallest included, so that places an estimate calls unimportant are looked at as often
as others. Every estimate of this room is audited by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.stats import generator, mean_interval
from cutaway.models.model import Model

STATISTICS = ["pearson", "spearman", "sign errors"]
_DRAWS = 1000
_ROUNDING = 1e-5  # of the largest effect: below it neither ranks nor signs mean anything
_STEPS = 100  # as many rounding steps of the metric in the model's dtype


@dataclass(frozen=True)
class Audit:
    """Exact mean effects where they were measured (NaN elsewhere), and the agreement of the estimate with them.

    `effects` are those of the chosen places, prompt by prompt.
    """

    exact: Float[Tensor, "node"]
    agreement: Float[Tensor, "statistic"]
    interval: Float[Tensor, "statistic bound"]
    chosen: tuple[int, ...]
    effects: Float[Tensor, "chosen prompt"]

    def exact_interval(self, places: int) -> Float[Tensor, "node bound"]:
        """The interval over prompts of each exact effect, NaN where none was measured."""
        out = torch.full((places, 2), torch.nan)
        out[list(self.chosen)] = mean_interval(self.effects.T)
        return out


def audit(
    measure: Callable[[list[int]], Float[Tensor, "chosen prompt"]],
    estimate: Float[Tensor, "node"],
    n: int,
    least: float,
    size: Float[Tensor, "node"] | None = None,
) -> Audit:
    """Measure the effect of `n` places exactly, spread over the ranks of `size` (by default |estimate|), and hold the
    estimate against it. `least` is what an effect can be by rounding alone.
    """
    chosen = stratified(estimate.abs() if size is None else size, n)
    found = measure(chosen)
    exact = torch.full_like(estimate, torch.nan)
    exact[chosen] = found.mean(-1)
    return Audit(exact, *agreement(estimate[chosen], exact[chosen], least), tuple(chosen), found)


def rounding(model: Model, values: Float[Tensor, "run prompt"]) -> float:
    """How large an effect can be by rounding alone, beside such values of the metric."""
    return _STEPS * torch.finfo(model.dtype).eps * float(values.abs().max())


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

    Numbers up to `least` count as zero in ranks and signs, and places that vary by no more have no correlation (NaN).
    A place is a sign error if its exact effect is not zero and the estimate has another sign, or none.
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
    return torch.stack([_pearson(a, b, least), _pearson(_ranks(u), _ranks(v)), wrong], dim=-1)


def _pearson(a: Tensor, b: Tensor, least: float = 0.0) -> Float[Tensor, "draw"]:
    """Row by row; NaN where a row does not vary by more than `least`, or has fewer than three places."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    far = (a.norm(dim=-1) > least) & (b.norm(dim=-1) > least) & (a.shape[-1] > 2)
    return torch.where(far, (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)), torch.nan)


def _ranks(a: Float[Tensor, "draw node"]) -> Float[Tensor, "draw node"]:
    """Average ranks, row by row."""
    order = a.sort(-1).values
    below, upto = (torch.searchsorted(order, a.contiguous(), right=right) for right in (False, True))
    return (below + upto).double() / 2
