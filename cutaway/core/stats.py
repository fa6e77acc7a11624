"""Statistics of claims: intervals, permutation and paired tests, nulls and their corrections.

Intervals of means over prompts, the common case, are in closed form for any number of cells at once, because prompts
are few and a bootstrap of few covers too little; everything else is scipy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused

BOUNDS = ["low", "high"]
DECILES = 10
_ALIKE = 1e6  # samples that a scale of the group is worth where cells do not differ
_OWN = 1.3  # a value is this much likelier outside than the samples that its scale was taken from (simulated)
_LONGEST = 2.0  # times Student's reach: Hall's transformation has a pole, where one outlier gives any length
LEAST_NULL = 19  # samples: the range of fewer is left by chance too often to mean anything


def generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a seeded random generator; the global one is never used."""
    return torch.Generator(device=device).manual_seed(seed)


def rotation(
    width: int,
    g: torch.Generator,
    *,
    columns: int | None = None,
    samples: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*sample width column"]:
    """Draw a random rotation of `width` dimensions, or the first `columns` of one, uniformly (Haar).

    The signs of R's diagonal make it uniform: without them the columns depend on the algorithm of the factorisation.
    """
    drawn = torch.randn(*samples, width, width if columns is None else columns, generator=g, dtype=dtype)
    q, r = torch.linalg.qr(drawn)
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def mean_interval(
    values: Float[Tensor, "prompt *cell"], *, level: float = 0.95, within: tuple[float, float] = (-math.inf, math.inf)
) -> Float[Tensor, "*cell bound"]:
    """Return the interval of the mean over the first axis, for every cell: Student's t, widened on the side of the
    longer tail.

    Each side is the further of t and of t after Hall's (1992) cubic transformation, which takes the skewness out, yet
    at most twice t; both quantiles are (1 + 1.4 / n²) times Student's. In simulation 95 % covers 93 to 98 % for two and
    more prompts whose values are normal, heavy-tailed, bounded or as skewed as an exponential (tests), and 89 to 95 %
    of a lognormal with σ = 1; resampling covers 50 % of two prompts and 80 % of four. `within` are the least and the
    largest value possible. One prompt gives an interval of zero information: both bounds are NaN.
    """
    n, shape = len(values), (*values.shape[1:], 2)
    if n < 2:
        return torch.full(shape, math.nan, dtype=torch.float32)
    flat = values.reshape(n, -1).double().cpu()
    mean = flat.mean(0)
    bounds = torch.stack([mean - reach for reach in _reaches(flat - mean, level)], -1)
    return bounds.clamp(*within).reshape(shape).float()


def one_prompt(prompts: int, *fields: str) -> dict[str, str]:
    """Reasons why fields have no interval over prompts: one prompt has no spread. Empty if there are several."""
    return {} if prompts > 1 else dict.fromkeys(fields, "one prompt")


def ratio_interval(
    above: Float[Tensor, "prompt *cell"],
    below: Float[Tensor, "prompt *cell"],
    *,
    level: float = 0.95,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Float[Tensor, "*cell bound"]:
    """Return the interval of mean(above) / mean(below) over pairs of values, as `mean_interval` of the ratio's linear
    part.

    One prompt gives NaN, as does a cell that is 0 throughout.
    """
    n, shape = len(above), (*above.shape[1:], 2)
    if n < 2:
        return torch.full(shape, math.nan, dtype=torch.float32)
    x, y = (t.reshape(n, -1).double().cpu() for t in (above, below))
    ratio = x.mean(0) / y.mean(0)
    apart = (x - ratio * y) / y.mean(0)
    bounds = torch.stack([ratio - reach for reach in _reaches(apart - apart.mean(0), level)], -1)
    return bounds.clamp(*within).reshape(shape).float()


def _reaches(away: Float[Tensor, "prompt cell"], level: float) -> list[Float[Tensor, "cell"]]:
    """Return the distances of the low and the high bound below the mean, from each prompt's distance to it."""
    from scipy import stats

    n = len(away)
    quantile = float(stats.t.ppf((1 + level) / 2, n - 1)) * (1 + 1.4 / n**2)
    error = away.square().mean(0).div(n - 1).sqrt()
    skew = (away.pow(3).mean(0) / away.square().mean(0).pow(1.5)).nan_to_num(0.0)
    k = (skew * math.sqrt(n * (n - 1)) / (n - 2) if n > 2 else torch.zeros_like(skew)) / math.sqrt(n)
    out = []
    for t in (quantile, -quantile):
        root = (1 + k * (t - k / 6)).sign() * (1 + k * (t - k / 6)).abs().pow(1 / 3)
        hall = torch.where(k.abs() < 1e-4, t, 3 / k * (root - 1))
        near, far = sorted((t, _LONGEST * t))
        out.append(error * hall.clamp(near, far))
    return out


def share_interval(hits: Float[Tensor, "prompt *cell"], *, level: float = 0.95) -> Float[Tensor, "*cell bound"]:
    """Return Wilson's score interval of the share of prompts with value 1, for every cell of zeros and ones.

    One prompt gives NaN, as everywhere.
    """
    if len(hits) < 2:
        return torch.full((*hits.shape[1:], 2), math.nan, dtype=torch.float32)
    return wilson_interval(hits.double().mean(0).cpu(), len(hits), level=level).float()


def wilson_interval(share: Float[Tensor, "*cell"], trials: int, *, level: float = 0.95) -> Float[Tensor, "*cell bound"]:
    """Return the score interval of proportions, each out of `trials` (Wilson 1927), in the dtype of `share`.

    It begins at 0 where nothing succeeded and ends at 1 where everything did, exactly.
    """
    from scipy import stats

    z2, n = float(stats.norm.ppf((1 + level) / 2)) ** 2, trials
    half = (z2 * (share * (1 - share) / n + z2 / (4 * n * n))).sqrt()
    bounds = torch.stack([share + z2 / (2 * n) - half, share + z2 / (2 * n) + half], -1) / (1 + z2 / n)
    low, high = bounds.clamp(0, 1).unbind(-1)
    return torch.stack([low.masked_fill(share == 0, 0.0), high.masked_fill(share == 1, 1.0)], -1)


def quantiles(
    values: Float[Tensor, "n"], shares: Sequence[float], level: float = 0.95
) -> tuple[Float[Tensor, "share"], Float[Tensor, "share bound"]]:
    """Return quantiles that are values themselves, and the interval of each from its order statistics.

    Values count as independent: the ranks at the bounds are binomial.
    """
    from scipy import stats

    ordered, n, out = values.sort().values, len(values), (1 - level) / 2
    at = [max(1, math.ceil(q * n)) - 1 for q in shares]
    ranks = [np.clip(stats.binom.ppf([out, 1 - out], n, q).astype(int) - [1, 0], 0, n - 1) for q in shares]
    exact, bounds = ordered[at], torch.stack([ordered[torch.from_numpy(r)] for r in ranks])
    return exact, torch.stack([torch.minimum(bounds[:, 0], exact), torch.maximum(bounds[:, 1], exact)], -1)


def deciles(values: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Return the decile of each value, from 0; ties in their order."""
    rank = torch.empty(len(values), dtype=torch.long)
    rank[values.argsort(stable=True)] = torch.arange(len(values))
    return rank * DECILES // max(len(values), 1)


def of_each_decile(values: Float[Tensor, "n"], number: int) -> list[tuple[int, int]]:
    """Return places of values evenly spaced in rank within each decile, the largest first, each behind its decile,
    from 1.
    """
    order, found = values.argsort(stable=True, descending=True).tolist(), list[tuple[int, int]]()
    for decile in range(DECILES, 0, -1):
        first, last = ((DECILES - d) * len(order) // DECILES for d in (decile, decile - 1))
        some = range(min(number, last - first))
        found += [(decile, order[first + i * (last - first) // number]) for i in some]
    return found


def bootstrap(
    values: Sequence[Float[Tensor, "prompt"]],
    statistic: Callable[..., Any],
    *,
    seed: int = 0,
    level: float = 0.95,
    samples: int = 2000,
    vectorized: bool = False,
) -> tuple[float, float]:
    """Paired percentile interval of any statistic of one or several columns of per-prompt values.

    A vectorized statistic takes many resamples at once and the `axis` of their prompts.
    """
    from scipy import stats

    columns = [v.double().cpu().numpy() for v in values]
    if len(columns[0]) < 2:
        return math.nan, math.nan
    got = stats.bootstrap(
        columns,
        statistic,
        paired=len(columns) > 1,
        vectorized=vectorized,
        n_resamples=samples,
        method="percentile",
        confidence_level=level,
        rng=np.random.default_rng(seed),
    )
    return float(got.confidence_interval.low), float(got.confidence_interval.high)


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return the score interval of one proportion; NaN without trials."""
    if trials == 0:
        return math.nan, math.nan
    low, high = wilson_interval(torch.tensor(successes / trials, dtype=torch.double), trials, level=level).tolist()
    return low, high


def correlation(x: Float[Tensor, "cell"], y: Float[Tensor, "cell"]) -> float:
    """Return Pearson's correlation; NaN of fewer than two values, or where one side does not vary."""
    if len(x) < 2 or float(x.std()) == 0 or float(y.std()) == 0:
        return math.nan
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def rank_correlation(x: Any, y: Any, axis: int = -1) -> Any:
    """Return Spearman's correlation along an axis; NaN where one side does not vary."""
    from scipy import stats

    ranks = [stats.rankdata(v, axis=axis) for v in (x, y)]
    a, b = (r - r.mean(axis, keepdims=True) for r in ranks)
    size = np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    return np.divide((a * b).sum(axis), size, out=np.full_like(size, np.nan), where=size > 0)


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
        (a.double().cpu().numpy(), b.double().cpu().numpy()),
        lambda x, y, axis=-1: x.mean(axis) - y.mean(axis),
        permutation_type=kind,
        vectorized=True,
        n_resamples=samples,
        rng=np.random.default_rng(seed),
    )
    return Test(float(got.statistic), float(got.pvalue), samples)


def exceeds_null(
    effect: Float[Tensor, "*cell"], null: Float[Tensor, "*cell sample"], two_sided: bool = True
) -> Float[Tensor, "*cell"]:
    """Monte-Carlo p-value of each effect against its null samples, (1 + #as extreme) / (1 + #samples)."""
    x, n = (effect.abs(), null.abs()) if two_sided else (effect, null)
    return (1 + (n >= x.unsqueeze(-1)).sum(-1)).float() / (1 + null.shape[-1])


def null_band(
    null: Float[Tensor, "cell sample"], cells: int | None = None, groups: Int[Tensor, "cell"] | None = None
) -> tuple[Float[Tensor, "cell bound"], float, bool]:
    """Return a band around each cell's null samples, the share of cells that chance alone puts outside, and if it is
    pooled.

    With at least 19 samples it is the cell's own range, which a value drawn like them leaves with probability
    2 / (samples + 1), as long as that is at most one of the `cells` (those marked together, by default these).
    Otherwise it is pooled: the cell's mean ± its scale times the deviation (of a sample from its cell's others, in
    their scale) that about one value in `cells`, and at most one in 20, exceeds among those of all cells. A scale lies
    between the cell's own and that of its group (such as its layer), nearer to the group's the less cells differ
    (Smyth 2004), so that cells of large nulls hide no others. NaN samples do not count; a single one deviates from 0.
    A cell without samples is held against those of other cells, in its group's scale; as samples of one cell may be
    alike, each cell then counts for one sample in the share.
    """
    cells = cells or len(null)
    count = null.isfinite().sum(-1)
    if null.shape[-1] >= LEAST_NULL and 2 * cells <= null.shape[-1] + 1:
        missing = null.isnan()
        bounds = [null.masked_fill(missing, math.inf).amin(-1), null.masked_fill(missing, -math.inf).amax(-1)]
        own = torch.stack(bounds, -1).masked_fill((count == 0)[:, None], math.nan)
        return own, 2 / (null.shape[-1] + 1), False
    x = null.double()
    if null.shape[-1] == 1:
        scaled = [(torch.zeros(len(x)), torch.ones(len(x)), x.abs())]
    else:
        n = x.isfinite().sum(-1, keepdim=True).double()
        apart = torch.where(x.isfinite(), x - x.nanmean(-1, keepdim=True), 0.0)
        worth, usual = _usual(apart, n, groups)
        scaled = [_scaled(x, apart, n, worth, usual), _of_others(x, usual.sqrt())]
    own = _OWN if null.shape[-1] > 1 else 1.0
    found = [away[away.isfinite()].sort(descending=True).values for _, _, away in scaled]
    if not len(found[0]):
        return torch.full((len(null), 2), math.nan), 1.0, True
    beyond = max(1, int((len(found[0]) + 1) / (own * max(cells, 20))))
    reaches = [values[beyond - 1] * scale for values, (_, scale, _) in zip(found, scaled, strict=True)]
    bounds = [torch.stack([c - r, c + r], -1) for (c, *_), r in zip(scaled, reaches, strict=True)]
    bare = count == 0
    beyond += (max(beyond, null.shape[-1]) - beyond) * float(bare.double().mean())
    band = torch.where(bare[:, None], bounds[-1], bounds[0])
    return band.to(null.dtype), min(1.0, own * beyond / (len(found[0]) + 1)), True


def _scaled(
    null: Float[Tensor, "cell sample"],
    apart: Float[Tensor, "cell sample"],
    n: Float[Tensor, "cell 1"],
    worth: float,
    usual: Float[Tensor, "cell 1"],
) -> tuple[Float[Tensor, "cell"], Float[Tensor, "cell"], Float[Tensor, "cell sample"]]:
    """Return each cell's mean and scale, and how far each of its samples lies from the mean of the others, in their
    scale.
    """
    square = apart.square().sum(-1, keepdim=True)
    scale = ((square + worth * usual) / (n - 1 + worth)).sqrt()
    others = (square - apart.square() * n / (n - 1)).clamp_min(0)  # the sum of squares without this sample
    away = (apart * n / (n - 1)).abs() / ((others + worth * usual) / (n - 2 + worth)).sqrt()
    return null.nanmean(-1), scale[:, 0], away.masked_fill(null.isnan() | (n < 2), math.nan)


def _of_others(
    null: Float[Tensor, "cell sample"], scale: Float[Tensor, "cell 1"]
) -> tuple[Float[Tensor, "cell"], Float[Tensor, "cell"], Float[Tensor, "cell sample"]]:
    """Return what a cell without samples is held against: the mean over cells in their groups' scales, that scale,
    and how far each sample lies from the mean of the other cells.
    """
    each = null / scale
    means = each.nanmean(-1, keepdim=True)
    there, total = means.isfinite().sum(), means.nansum()
    others = (total - means) / (there - 1).clamp_min(1)
    return (total / there) * scale[:, 0], scale[:, 0], (each - others).abs()


def layer_band(
    null: Float[Tensor, "layer head sample"], cells: int | None = None
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
    """Return both ends of the null's band (`null_band`) for every head, in the scale of its layer.

    `cells` is the number of heads that are asked, by default all.
    """
    layers = torch.arange(len(null)).repeat_interleave(null.shape[1])
    low, high = null_band(null.flatten(0, 1), cells, groups=layers)[0].reshape(*null.shape[:2], 2).unbind(-1)
    return low, high


def _usual(
    apart: Float[Tensor, "cell sample"], n: Float[Tensor, "cell 1"], groups: Int[Tensor, "cell"] | None
) -> tuple[float, Float[Tensor, "cell 1"]]:
    """Return the prior of a group's variance: its weight in samples, and its value for each cell.

    Estimated from the moments of log variances (Smyth 2004); scatter beyond chance means that cells really differ.
    """
    free, square = n[:, 0] - 1, apart.square().sum(-1)
    varied = (square > 0) & (free > 0)
    group = torch.zeros(len(n), dtype=torch.long) if groups is None else groups
    if int(varied.sum()) < 3:
        return _ALIKE, torch.ones_like(n)
    half, of = free[varied] / 2, group[varied]
    level = (square[varied] / free[varied]).log() - half.digamma() + half.log()
    many = torch.bincount(of, minlength=int(group.max()) + 1)
    total = torch.zeros(len(many), dtype=torch.double).index_add_(0, of, level)
    mean = torch.where(many > 2, total / many.clamp_min(1), level.mean())
    left = max(1, len(level) - int((many > 2).sum()))
    more = float((level - mean[of]).square().sum() / left - torch.polygamma(1, half).mean())
    worth = min(_ALIKE, max(0.5, 2 * _inverse_trigamma(more))) if more > 1e-3 else _ALIKE
    known = mean + math.log(2 / worth) + float(torch.tensor(worth / 2).double().digamma())
    return worth, known.exp()[group][:, None]


def _inverse_trigamma(y: float) -> float:
    x = torch.tensor(0.5 + 1 / y, dtype=torch.double)
    for _ in range(20):  # Newton's steps on 1 / trigamma, from below (Smyth 2004)
        value = torch.polygamma(1, x)
        x = x + value * (1 - value / y) / torch.polygamma(2, x)
    return float(x)


def false_discovery(p: Float[Tensor, "*cell"]) -> Float[Tensor, "*cell"]:
    """Benjamini-Hochberg adjusted p-values over all cells (scipy)."""
    from scipy import stats

    flat = p.reshape(-1).double().cpu().numpy()
    return torch.from_numpy(stats.false_discovery_control(flat)).float().reshape(p.shape)


def matched_random(
    chosen: Sequence[int], pool: int, *, groups: Sequence[Hashable] | None = None, seed: int = 0, samples: int = 20
) -> list[list[int]]:
    """`samples` random sets of the same size as `chosen`, drawn from `range(pool)` without the chosen ones.

    With `groups` (the group of each member of the pool), each set has as many members of each group as `chosen`.

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
