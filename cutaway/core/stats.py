"""Statistics of claims: bootstrap intervals, permutation and paired tests, nulls and their corrections.

Means over prompts, the common case, are bootstrapped by one matrix product for any number of cells at once;
everything else is scipy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused

BOUNDS = ["low", "high"]
_FEW = 6  # prompts, of which few enough resamples differ that sorting these is quicker than picking from all
_AT_ONCE = 512  # cells whose resamples are held at once
LEAST_NULL = 19  # samples: the range of fewer is left by chance too often to mean anything


def generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A seeded random source; nothing in this house touches the global one."""
    return torch.Generator(device=device).manual_seed(seed)


def bootstrap_mean(
    values: Float[Tensor, "prompt *cell"], *, seed: int = 0, level: float = 0.95, samples: int = 2000
) -> Float[Tensor, "*cell bound"]:
    """Percentile bootstrap interval of the mean over the first axis (Efron 1979), for every cell.

    The same resampled prompts serve every cell, so differences between cells stay paired. One prompt gives an
    interval of zero information: both bounds are NaN.
    """
    n = len(values)
    flat = values.reshape(n, -1).double().cpu()
    if n < 2:
        return torch.full((*values.shape[1:], 2), math.nan, dtype=torch.float32)
    weights, times = _distinct(_resamples(n, samples, seed))
    parts = [_quantiles(part.T @ weights.T, times, _tails(level)) for part in flat.split(_AT_ONCE, dim=1)]
    return torch.cat(parts).reshape(*values.shape[1:], 2).float() if parts else values.new_zeros(*values.shape[1:], 2)


def bootstrap_ratio(
    above: Float[Tensor, "prompt *cell"],
    below: Float[Tensor, "prompt *cell"],
    *,
    seed: int = 0,
    level: float = 0.95,
    samples: int = 2000,
) -> Float[Tensor, "*cell bound"]:
    """Percentile bootstrap interval of mean(above) / mean(below), resampling pairs of values.

    One prompt gives NaN, as does a cell that is 0 throughout.
    """
    n = len(above)
    if n < 2:
        return torch.full((*above.shape[1:], 2), math.nan, dtype=torch.float32)
    weights, times = _distinct(_resamples(n, samples, seed))
    x, y = (t.reshape(n, -1).double().cpu() for t in (above, below))
    bounds = _quantiles((x.T @ weights.T) / (y.T @ weights.T), times, _tails(level))
    return bounds.reshape(*above.shape[1:], 2).float()


def _resamples(n: int, samples: int, seed: int) -> Float[Tensor, "sample prompt"]:
    """Weights of the prompts in each resample."""
    draws = torch.randint(n, (samples, n), generator=generator(seed))
    ones = torch.ones(samples, n, dtype=torch.double)
    return torch.zeros_like(ones).scatter_add_(1, draws, ones) / n


def _distinct(weights: Float[Tensor, "sample prompt"]) -> tuple[Float[Tensor, "some prompt"], Int[Tensor, "some"]]:
    """The resamples that differ, and how often each was drawn: few prompts have few, which need computing once."""
    if weights.shape[1] > _FEW:
        return weights, torch.ones(len(weights), dtype=torch.long)
    return weights.unique(dim=0, return_counts=True)


def _quantiles(
    values: Float[Tensor, "cell some"], times: Int[Tensor, "some"], at: Float[Tensor, "bound"]
) -> Float[Tensor, "cell bound"]:
    """Quantiles of each row whose values count so many times; as `torch.quantile`, and as there NaN where one is."""
    place = at * (int(times.sum()) - 1)
    ranks = torch.cat([place.floor(), place.ceil()]).long()
    missing = values.isnan().any(-1, keepdim=True)
    if len(times) < int(times.sum()):
        values, order = values.sort(-1)
        upto = times[order].cumsum(-1)
        ranks = torch.searchsorted(upto, ranks.expand(len(upto), -1).contiguous(), right=True)
        found = values.gather(1, ranks)
    else:
        held = values.detach().numpy()  # sorted in place, as far as the ranks need
        held.partition(sorted(set(ranks.tolist())), axis=-1)
        found = values[:, ranks]
    low, high = found.chunk(2, dim=-1)
    return torch.lerp(low, high, place - place.floor()).masked_fill(missing, math.nan)


def _tails(level: float) -> Float[Tensor, "bound"]:
    tail = (1 - level) / 2
    return torch.tensor([tail, 1 - tail], dtype=torch.double)


def bootstrap(
    values: Sequence[Float[Tensor, "prompt"]],
    statistic: Callable[..., float],
    *,
    seed: int = 0,
    level: float = 0.95,
    samples: int = 2000,
) -> tuple[float, float]:
    """Paired percentile interval of any statistic of one or several columns of per-prompt values."""
    from scipy import stats

    columns = [v.double().cpu().numpy() for v in values]
    if len(columns[0]) < 2:
        return math.nan, math.nan
    got = stats.bootstrap(
        columns, statistic, paired=len(columns) > 1, vectorized=False, n_resamples=samples, method="percentile",
        confidence_level=level, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(got.confidence_interval.low), float(got.confidence_interval.high)


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927)."""
    from scipy import stats

    if trials == 0:
        return math.nan, math.nan
    interval = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Test:
    """Outcome of a test: the observed statistic and its p-value, with the number of resamples behind it."""

    __test__ = False  # not a test class of pytest
    statistic: float
    p: float
    samples: int


def permutation(a: Float[Tensor, "n"], b: Float[Tensor, "m"], *, seed: int = 0, samples: int = 5000) -> Test:
    """Two-sided permutation test of a difference of means between independent samples."""
    return _permute(a, b, "independent", seed, samples)


def paired(a: Float[Tensor, "n"], b: Float[Tensor, "m"], *, seed: int = 0, samples: int = 5000) -> Test:
    """Two-sided sign-flip test of a mean paired difference.

    Raises:
        Refused: the two columns differ in length.
    """
    if len(a) != len(b):
        raise Refused(f"paired test of {len(a)} and {len(b)} values", "pairs need equal lengths", "use permutation()")
    return _permute(a, b, "samples", seed, samples)


def _permute(a: Tensor, b: Tensor, kind: str, seed: int, samples: int) -> Test:
    from scipy import stats

    got = stats.permutation_test(
        (a.double().cpu().numpy(), b.double().cpu().numpy()), lambda x, y, axis=-1: x.mean(axis) - y.mean(axis),
        permutation_type=kind, vectorized=True, n_resamples=samples, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Test(float(got.statistic), float(got.pvalue), samples)


def exceeds_null(
    effect: Float[Tensor, "*cell"], null: Float[Tensor, "*cell sample"], two_sided: bool = True
) -> Float[Tensor, "*cell"]:
    """Monte-Carlo p-value of each effect against its null samples, (1 + #as extreme) / (1 + #samples)."""
    x, n = (effect.abs(), null.abs()) if two_sided else (effect, null)
    return (1 + (n >= x.unsqueeze(-1)).sum(-1)).float() / (1 + null.shape[-1])


def null_band(
    null: Float[Tensor, "cell sample"], cells: int | None = None
) -> tuple[Float[Tensor, "cell bound"], float, bool]:
    """A band around each cell's null samples, the share of cells that chance alone puts outside, and if it is pooled.

    With at least 19 samples it is the cell's own range, which a value drawn like them leaves with probability
    2 / (samples + 1), as long as that is at most one of the `cells` (those marked together, by default these).
    Otherwise it is pooled: the cell's mean ± the deviation (of a sample from the mean of its cell's other samples, in
    size) that only one value in `cells`, and at most one in 20, exceeds among those of all cells. Both hold whatever
    the distribution, also if it differs from cell to cell. NaN samples do not count; a single one deviates from 0.
    """
    cells = cells or len(null)
    count = null.isfinite().sum(-1)
    if null.shape[-1] >= LEAST_NULL and 2 * cells <= null.shape[-1] + 1:
        missing = null.isnan()
        bounds = [null.masked_fill(missing, math.inf).amin(-1), null.masked_fill(missing, -math.inf).amax(-1)]
        own = torch.stack(bounds, -1).masked_fill((count == 0)[:, None], math.nan)
        return own, 2 / (null.shape[-1] + 1), False
    centre = null.nanmean(-1) if null.shape[-1] > 1 else torch.zeros(len(null))
    away = (null - centre[:, None]).abs() * (count / (count - 1))[:, None] if null.shape[-1] > 1 else null.abs()
    found = away[away.isfinite()].sort(descending=True).values
    if not len(found):
        return torch.full((len(null), 2), math.nan), 1.0, True
    beyond = max(1, int((len(found) + 1) / max(cells, 20)))
    reach = found[beyond - 1]
    return torch.stack([centre - reach, centre + reach], -1), beyond / (len(found) + 1), True


def false_discovery(p: Float[Tensor, "*cell"]) -> Float[Tensor, "*cell"]:
    """Benjamini-Hochberg adjusted p-values over all cells (scipy)."""
    from scipy import stats

    flat = p.reshape(-1).double().cpu().numpy()
    return torch.from_numpy(stats.false_discovery_control(flat)).float().reshape(p.shape)


def matched_random(
    chosen: Sequence[int], pool: int, *, groups: Sequence[Hashable] | None = None, seed: int = 0, samples: int = 20
) -> list[list[int]]:
    """`samples` random sets of the same size as `chosen`, drawn from `range(pool)` without the chosen ones.

    With `groups`, one a member of the pool, as many of each group as `chosen` has.

    Raises:
        Refused: the rest of the pool, or of a group, is smaller than the set's part in it.
    """
    of, g = groups if groups is not None else [0] * pool, generator(seed)
    parts = list[tuple[Tensor, int]]()
    for group in dict.fromkeys(of):
        mine = [i for i in range(pool) if of[i] == group]
        rest, wanted = [i for i in mine if i not in set(chosen)], len(set(mine) & set(chosen))
        if len(rest) < wanted:
            where = "" if groups is None else f" in {group}"
            what, left = f"a random control of {wanted} out of {len(mine)}{where}", f"only {len(rest)} are left"
            raise Refused(what, left, "choose a smaller set")
        parts.append((torch.tensor(rest), wanted))
    return [
        [i for rest, n in parts for i in rest[torch.randperm(len(rest), generator=g)[:n]].tolist()]
        for _ in range(samples)
    ]
