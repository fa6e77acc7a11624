"""Audit of estimates: exact effects at a sample of places, and how well the estimate agrees with all.

Half of the sample are the places of largest |estimate|; the other half is drawn at random from strata of the ranks of
the rest, so that places an estimate calls unimportant are looked at too. Places whose value is the same in both runs
have no effect, and to measure one tells nothing: neither half has any of them, unless all places are measured or none
moves. Every statistic is one of all places that can be drawn: each place drawn counts for as many as it was drawn from.
Every estimate of this room is audited by it.

The interval holds what measuring all places would give. It is the wider of two: resampled weights of the places drawn
(Rao & Wu 1988; Rubin 1981), for ranks with one more place of any rank, and the textbook's for as many places (Fisher's
z, Wilson's score, a slope's standard error), both without the part that was measured whole. Tests draw many samples
where all places are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.core.stats import generator, mean_interval
from cutaway.models.model import Model

STATISTICS = ["pearson", "spearman", "sign errors", "exact / estimate"]
_DRAWS = 1000
_STRATUM = 4  # places drawn from one stratum
_ROUNDING = 1e-5  # of the largest effect: below it neither ranks nor signs mean anything
_STEPS = 100  # as many rounding steps of the metric in the model's dtype
_SURE = 1.96  # standard errors on either side of 95 %


@dataclass(frozen=True)
class Sample:
    """The places that are measured.

    Attributes:
        chosen: their numbers, ascending.
        stratum: the stratum of each.
        sizes: places in each stratum, measured or not.
        still: number of further places, whose value is the same in both runs.
    """

    chosen: tuple[int, ...]
    stratum: tuple[int, ...]
    sizes: tuple[int, ...]
    still: int = 0

    @property
    def places(self) -> int:
        """All places that can be drawn, measured or not."""
        return sum(self.sizes)

    @property
    def taken(self) -> tuple[int, ...]:
        """Number of places measured in each stratum."""
        return tuple(self.stratum.count(s) for s in range(len(self.sizes)))

    @property
    def weights(self) -> Float[Tensor, "chosen"]:
        """Number of places that each measured one represents."""
        taken = self.taken
        return torch.tensor([self.sizes[s] / taken[s] for s in self.stratum], dtype=torch.double)

    def resampled(self, rng: np.random.Generator) -> Float[Tensor, "draw chosen"]:
        """Return the weights as other samples might have given them: 1 for itself, and a random share of its
        stratum's rest.
        """
        out = torch.ones(_DRAWS, len(self.chosen), dtype=torch.double)
        for s, (size, n) in enumerate(zip(self.sizes, self.taken, strict=True)):
            mine = [i for i, of in enumerate(self.stratum) if of == s]
            if not mine:
                continue  # nothing is known of it
            # Shares by Dirichlet(a, …, a), which spread as means of n places do, and a third more as n is small.
            a = max(0.2, (n - 1) / 1.33 / n - 1 / n)
            share = torch.from_numpy(rng.gamma(a, size=(_DRAWS, n))) + 1e-300
            out[:, mine] += (size - n) * share / share.sum(1, keepdim=True)
        return out

    def __str__(self) -> str:
        cells = f"the {self.places} cells that move" if self.still else f"all {self.places} cells"
        if len(self.chosen) == self.places:
            return f"measured at {cells}"
        k, parts = len(self.chosen), len(self.sizes) - 1
        drawn = f", {k - self.sizes[0]} drawn from {parts} {'stratum' if parts == 1 else 'strata'} of the rest" * (
            parts > 0
        )
        return f"of {cells}, from {k} measured: the {self.sizes[0]} largest{drawn}"


@dataclass(frozen=True)
class Audit:
    """Exact mean effects where they were measured (NaN elsewhere), and the agreement of the estimate with all.

    `effects` are those of the sample, prompt by prompt; `null` the mean effects of random steps at its places.
    """

    exact: Float[Tensor, "node"]
    agreement: Float[Tensor, "statistic"]
    interval: Float[Tensor, "statistic bound"]
    sample: Sample
    effects: Float[Tensor, "chosen prompt"]
    null: Float[Tensor, "node sample"] | None = None

    def exact_interval(self, places: int) -> Float[Tensor, "node bound"]:
        """Return the interval over prompts of each exact effect, NaN where none was measured."""
        out = torch.full((places, 2), torch.nan)
        out[list(self.sample.chosen)] = mean_interval(self.effects.T)
        return out


def audit(
    measure: Callable[[list[int]], Float[Tensor, "chosen prompt"]],
    estimate: Float[Tensor, "node"],
    n: int,
    least: float,
    size: Float[Tensor, "node"] | None = None,
    seed: int = 0,
    moves: Bool[Tensor, "node"] | None = None,
) -> Audit:
    """Measure the effect of `n` places exactly, chosen by `size` (by default |estimate|), and hold the estimate against
    it. `least` is what an effect can be by rounding alone, and `moves` tells the places whose value differs between the
    runs.
    """
    sample = drawn(estimate.abs() if size is None else size, n, seed, moves)
    chosen = list(sample.chosen)
    found = measure(chosen)
    exact = torch.full_like(estimate, torch.nan)
    exact[chosen] = found.mean(-1)
    return Audit(exact, *agreement(estimate[chosen], exact[chosen], sample, least), sample, found)


def rounding(model: Model, values: Float[Tensor, "run prompt"]) -> float:
    """Return the largest effect that rounding alone can make, given values of the metric."""
    return _STEPS * torch.finfo(model.dtype).eps * float(values.abs().max())


def drawn(size: Float[Tensor, "node"], n: int, seed: int = 0, moves: Bool[Tensor, "node"] | None = None) -> Sample:
    """Return a sample of `n` places: half of them those of largest `size`, the others drawn from strata of the rest by
    rank.

    Sizes that differ by rounding only count as equal, and equal ones keep their order. Only places that move are drawn,
    unless `n` is all places or none moves.
    """
    if moves is not None and n < len(size) and 0 < int(moves.sum()) < len(size):
        there = moves.nonzero()[:, 0]
        some = drawn(size[there], n, seed)
        return replace(some, chosen=tuple(there[list(some.chosen)].tolist()), still=len(size) - len(there))
    n, g = min(n, len(size)), generator(seed)
    grain = float(size.max()) * _ROUNDING
    order = (-size / grain).round().argsort(stable=True) if grain else torch.arange(len(size))
    top = n if n == len(size) else (n + 1) // 2
    rest = order[top:]
    count = min(len(rest), max(1, (n - top) // _STRATUM))
    cuts, takes = ([m * i // max(count, 1) for i in range(count + 1)] for m in (len(rest), n - top))
    found = [(i, 0) for i in order[:top].tolist()]
    for s in range(count):
        stratum = rest[cuts[s] : cuts[s + 1]]
        picked = torch.randperm(len(stratum), generator=g)[: takes[s + 1] - takes[s]]
        found += [(i, s + 1) for i in stratum[picked].tolist()]
    chosen, of = zip(*sorted(found), strict=True)
    return Sample(chosen, of, (top, *(cuts[s + 1] - cuts[s] for s in range(count))))


def agreement(
    estimate: Float[Tensor, "chosen"], exact: Float[Tensor, "chosen"], sample: Sample, least: float = 0.0
) -> tuple[Float[Tensor, "statistic"], Float[Tensor, "statistic bound"]]:
    """Pearson and Spearman correlation, the share of sign errors, and the slope of exact effects over estimates through
    zero, as estimates of what all places would give, each with its 95 % interval; without one if all were measured.

    Numbers up to `least` count as zero in ranks and signs, and places that vary by no more have no correlation (NaN).
    A place is a sign error if its exact effect is not zero and the estimate has another sign, or none.
    """
    a, b = estimate.double(), exact.double()
    least = max(least, float(b.abs().max()) * _ROUNDING)
    values = _statistics(a, b, sample.weights[None], least)[0]
    if len(sample.chosen) == sample.places:
        return values.float(), values.float()[:, None].repeat(1, 2)
    weights = sample.resampled(np.random.default_rng(0))
    spread = _statistics(a, b, weights, least)
    more = _with_another(a, b, weights, sample, least)
    tails = torch.tensor([0.025, 0.975], dtype=torch.double)
    bounds = [spread.nanquantile(tails, dim=0).T, more.nanquantile(tails)[None].expand(4, 2), _textbook(values, sample)]
    bounds[1] = torch.where(torch.tensor([False, True, False, False])[:, None], bounds[1], torch.nan)
    low, high = torch.stack(bounds).nan_to_num(math.inf).amin(0), torch.stack(bounds).nan_to_num(-math.inf).amax(0)
    return values.float(), torch.stack([low[:, 0], high[:, 1]], -1).masked_fill(
        values.isnan()[:, None], math.nan
    ).float()


def _statistics(a: Tensor, b: Tensor, w: Float[Tensor, "draw chosen"], least: float) -> Float[Tensor, "draw statistic"]:
    u, v = (torch.where(t.abs() > least, t, 0.0) for t in (a, b))
    wrong, there = ((u.sign() != v.sign()) & (v != 0)).double(), (v != 0).double()
    square = (a * a).sum()
    slope = (w * a * b).sum(-1) / (w * a * a).sum(-1) if float(square) > least**2 else torch.full((len(w),), torch.nan)
    ranked = _pearson(_ranks(u, w), _ranks(v, w), w)
    return torch.stack([_pearson(a, b, w, least), ranked, (w * wrong).sum(-1) / (w * there).sum(-1), slope], dim=-1)


def _with_another(
    a: Tensor, b: Tensor, w: Float[Tensor, "draw chosen"], sample: Sample, least: float
) -> Float[Tensor, "draw"]:
    """Spearman's correlation with one more place of any two ranks, which stands for a share of those not measured."""
    u, v = (torch.where(t.abs() > least, t, 0.0) for t in (a, b))
    total, chance = w.sum(1, keepdim=True), torch.rand(len(w), 3, generator=generator(0), dtype=torch.double)
    others = max(len(sample.chosen) - sample.sizes[0], 1)
    weight = (sample.places - len(sample.chosen)) * (1 - chance[:, 2:] ** (1 / others))
    x, y = (torch.cat([_ranks(t, w) / total, chance[:, i : i + 1]], 1) for i, t in enumerate((u, v)))
    return _pearson(x, y, torch.cat([w, weight], 1))


def _textbook(values: Float[Tensor, "statistic"], sample: Sample) -> Float[Tensor, "statistic bound"]:
    """Return the intervals of the formulas for independent places.

    Their number is that of the places measured or, for ranks and signs, which weigh all places alike, the effective
    number of the weighted ones.
    """
    pearson, spearman, wrong, slope = values.tolist()
    w, n = sample.weights, len(sample.chosen)
    left, worth = math.sqrt(1 - n / sample.places), float(w.sum() ** 2 / (w**2).sum())
    out = []
    for r, m in ((pearson, n), (spearman, worth)):
        z, half = math.atanh(max(-1 + 1e-9, min(r, 1 - 1e-9))), _SURE * left / math.sqrt(max(m - 3, 1))
        out.append((math.tanh(z - half), math.tanh(z + half)) if math.isfinite(r) else (math.nan, math.nan))
    z2 = _SURE**2 / worth
    middle = (wrong + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * wrong * (1 - wrong) + z2**2 / 4) / (1 + z2) if math.isfinite(wrong) else math.nan
    out.append((middle - half, middle + half))
    error = abs(slope) * math.sqrt(max(1 / pearson**2 - 1, 0) / max(n - 2, 1)) if pearson else math.nan
    out.append((slope - _SURE * left * error, slope + _SURE * left * error))
    return torch.tensor(out, dtype=torch.double)


def _pearson(a: Tensor, b: Tensor, w: Float[Tensor, "draw chosen"], least: float = 0.0) -> Float[Tensor, "draw"]:
    """Return Pearson's r per row of weights; NaN where values vary by under `least`, or for under three places."""
    total = w.sum(-1, keepdim=True)
    a, b = a - (w * a).sum(-1, keepdim=True) / total, b - (w * b).sum(-1, keepdim=True) / total
    size = [(w * t * t).sum(-1).sqrt() for t in (a, b)]
    far = (size[0] > least) & (size[1] > least) & (w.shape[-1] > 2)
    return torch.where(far, (w * a * b).sum(-1) / (size[0] * size[1]), torch.nan)


def _ranks(a: Float[Tensor, "chosen"], w: Float[Tensor, "draw chosen"]) -> Float[Tensor, "draw chosen"]:
    """Average ranks among all places that the weights stand for, row by row."""
    below = (a[:, None] > a[None]).double() + (a[:, None] == a[None]).double() / 2
    return w @ below.T
