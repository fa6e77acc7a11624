"""Are features decomposable, linear, superposed, and aligned with the basis?

A battery in strict order, on activations of which the features are known: planted, labelled, or a dictionary's latents.
A property is asked only if those before it hold, for its definition needs them.

1. *Decomposable*: a feature writes the same whatever the others are. `statistic`: the variance that products with the
   other features explain, as a share of what the feature explains. Two features in one direction (cosine above 0.99)
   cannot be told apart and are not decomposable.
2. *Linear*: h = Σ value · direction. `statistic`: the variance that curves of the feature explain beyond its value, as
   a share of what the feature explains. Features with two values are always linear.
3. *Superposed* (Elhage et al. 2022, arXiv:2209.10652): the directions of the represented features, W [feature, d], are
   linearly dependent, so that W Wᵀ has no inverse. `statistic`: the smallest singular value of W with rows of length 1.
4. *Aligned with the basis*: each feature has a dimension of its own. `statistic`: the share of a direction's square
   that is in its largest dimension. Superposed features cannot be aligned.

`partly_aligned` is beside the order: Hoyer's sparsity of the directions, averaged, which features that are spread over
a few neurons have, superposed or not.

* Each statistic is that of the worst feature that is represented: that explains anything, and writes at least a tenth
  as far per unit of its value's deviation as the one that writes furthest. In 1 and 2 errors are of examples that were
  not fitted. `verdict`: 1 yes, 0 no, NaN undecided or not asked (`reasons`).
* `interval`: 95 %, over examples; of 3, 4 and 5 from resampled examples.
* Control (`null`): in 1 and 2 the residuals shuffled among examples, the largest of any feature; in 3 how far
  resampling alone moves W (its spectral norm bounds how far a singular value of 0 can move); in 4 and 5 the same
  directions in randomly rotated bases.
* `dimensionality`: ‖W_i‖² / Σ_j (Ŵ_i · W_j)², 1 for a feature with a dimension of its own.
* Assumption: features vary independently enough to be told apart. Products see interactions of pairs only.
* Known failures: a feature that is left out and goes with two others looks like their interaction. In two dimensions a
  random basis aligns two directions by chance, and the null shows it.
* Cost: no forward; about features · samples regressions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.method import method
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, ratio_interval, rotation
from cutaway.geometry.encoding import Encoding
from cutaway.geometry.regression import Columns, directions, errors, folds

ORDER = ("decomposable", "linear", "superposed", "basis_aligned", "partly_aligned")
_ONE_DIRECTION = 0.99
_REPRESENTED = 0.1  # of the furthest that a feature writes
_SPARSER = 0.1  # by so much more than in rotated bases
_FEWEST = 40
_SHARE = "share of the feature's variance"
_UNITS = {
    "statistic": "share",
    "decomposable": _SHARE,
    "linear": _SHARE,
    "superposed": "smallest singular value",
    "basis_aligned": "share of the square",
    "partly_aligned": "Hoyer's sparsity",
    "verdict": "yes is 1",
    "interaction": _SHARE,
    "curvature": _SHARE,
    "largest": "share of the square",
    "cosine": "cosine",
    "dimensionality": "dimensions",
    "represented": "yes is 1",
}


@dataclass(frozen=True, kw_only=True)
class Properties(Result, kind="feature_properties"):
    """The kind of encoding that features have, property by property.

    Attributes:
        statistic: the number that the verdict rests on, of the worst feature.
        interval: of `statistic`, 95 %, over examples.
        null: what the control gives in place of `statistic`.
        verdict: 1 if it holds, 0 if not; NaN if undecided or not asked.
        interaction: per feature, the share that products with other features explain.
        curvature: per feature, the share that curves explain beyond the value.
        largest: per feature, the share of its direction's square in its largest dimension.
        cosine: per feature, the largest cosine with another represented feature.
        dimensionality: per feature, the share of a dimension that it has.
        represented: 1 for features that are represented, 0 for others.
    """

    statistic: Float[Tensor, "property"]
    interval: Float[Tensor, "property bound"]
    null: Float[Tensor, "property sample"]
    verdict: Float[Tensor, "property"]
    interaction: Float[Tensor, "feature"]
    curvature: Float[Tensor, "feature"]
    largest: Float[Tensor, "feature"]
    cosine: Float[Tensor, "feature"]
    dimensionality: Float[Tensor, "feature"]
    represented: Float[Tensor, "feature"]

    def words(self) -> dict[str, str]:
        """Return each verdict in a word: yes, no, or – where there is none."""
        said = ["–" if math.isnan(v) else "yes" if v else "no" for v in self.verdict.tolist()]
        return dict(zip(self.labels["property"], said, strict=True))


@method(
    answers="Are features decomposable, linear, superposed, and aligned with the basis?",
    paper="Elhage et al. 2022, arXiv:2209.10652",
    cost="0",
    control="shuffled_residuals_and_rotated_bases",
    rung="observational",
)
def properties(
    encoding: Encoding, /, *, margin: float = 0.05, least: float = 0.9, samples: int = 200, seed: int = 0
) -> Properties:
    """Judge an encoding by the properties of its features, in strict order.

    Args:
        margin: share of a feature's variance below which interactions and curves do not count.
        least: share of a direction's square that an aligned feature has in one dimension.
        samples: number of samples of each control, and of resamplings.
        seed: seed of all that is drawn.

    Raises:
        Refused: fewer than 40 examples, a share outside 0 to 1, or a feature that does not vary.
    """
    for name, share in (("margin", margin), ("least", least)):
        if not 0 < share < 1:
            raise Refused(Call("properties", {name: share}), "it is a share between 0 and 1", "leave it at its default")
    if len(encoding.values) < _FEWEST:
        why = f"it has {len(encoding.values)} examples, and fits are judged on a part of them"
        raise Refused("properties of the encoding", why, f"give at least {_FEWEST}, better hundreds")
    still = [n for n, v in zip(encoding.features, encoding.values.std(0).tolist(), strict=True) if not v > 0]
    if still:
        raise Refused(f"feature {still[0]!r}", "its value is the same in all examples", "leave it out")
    seen = _Shares.of(encoding, samples, seed)
    there = (seen.explained[0] > 0) & (seen.strength >= _REPRESENTED * seen.strength.max())
    rows = _Rows.of(encoding, there, samples, seed + 1)
    return _result(encoding, seen, there, rows, margin, least)


@dataclass(frozen=True)
class _Shares:
    """Interaction and curvature of each feature: value, interval and null [2, feature, …], and what it explains.

    Attributes:
        explained: the lower bound of the share of all variance that a feature explains, and the mean that it explains.
        strength: how far it writes per deviation of its value.
    """

    value: Tensor
    interval: Tensor
    null: Tensor
    explained: Tensor
    strength: Tensor

    @classmethod
    def of(cls, encoding: Encoding, samples: int, seed: int) -> _Shares:
        g, x = generator(seed), encoding.activations.double()
        x = x - x.mean(0)
        columns, fold = Columns.of(encoding.values), folds(len(x))
        orders = [torch.randperm(len(x), generator=g) for _ in range(samples)]
        total = x.square().sum(1)
        value, interval, null, explained = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
        for i in range(len(encoding.features)):
            linear, curve, cross = columns.linear[:, [i]], columns.curve[i], columns.cross[i]
            others = columns.without(i)
            bare = errors(x, others, linear, fold)[0]
            straight, curved, of_curve = errors(x, torch.cat([others, linear], 1), curve, fold, orders)
            apart, crossed, of_cross = errors(x, torch.cat([others, linear, curve], 1), cross, fold, orders)
            own, whole = bare - curved, bare - crossed  # what value and curve explain of each example; with products
            parts = [(apart - crossed, whole, of_cross), (straight - curved, own, of_curve)]
            value.append(torch.stack([gain.mean() / _mean(w) for gain, w, _ in parts]))
            interval.append(torch.stack([ratio_interval(e, w, within=(-1, 1)).double() for e, w, _ in parts]))
            null.append(torch.stack([chance / _mean(w) for _, w, chance in parts]))
            low = max(float(ratio_interval(w, total)[0]) for w in (own, whole))
            explained.append(torch.stack([x.new_tensor(low), whole.mean()]))
        value, interval, null = (torch.stack(t, 1) for t in (value, interval, null))
        explained = torch.stack(explained, 1)
        return cls(value, interval, null, explained, explained[1].clamp_min(0).sqrt())


def _mean(whole: Tensor) -> Tensor:
    """Return the mean of what is explained, as a divisor."""
    return whole.mean().clamp_min(1e-30)


@dataclass(frozen=True)
class _Rows:
    """Directions of the represented features [feature, d], of length 1, and statistics of them in three groups.

    Attributes:
        length: their lengths before.
        rows: the directions.
        value: smallest singular value, smallest largest share, and mean sparsity.
        interval: of each, from resampled examples.
        null: of each [3, sample].
    """

    length: Tensor
    rows: Tensor
    value: Tensor
    interval: Tensor
    null: Tensor

    @classmethod
    def of(cls, encoding: Encoding, there: Tensor, samples: int, seed: int) -> _Rows:
        g, x, values = generator(seed), encoding.activations.double(), encoding.values.double()
        n = len(x)
        drawn = torch.randint(0, n, (samples, n), generator=g)
        weight = torch.zeros(samples + 1, n, dtype=torch.double)
        weight[1:].scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.double))
        weight[0] = 1.0
        raw = directions(values, x, weight)[:, there]  # [1 + sample, feature, d]
        unit = normalize(raw, dim=-1)
        rows, resampled = unit[0], unit[1:]
        every = torch.stack([_least_singular(unit), _shares(unit).amin(-1), sparsity(unit).mean(-1)])
        bounds = torch.quantile(every[:, 1:], torch.tensor([0.025, 0.975], dtype=torch.double), dim=1)
        bounds = torch.stack([bounds[0].minimum(every[:, 0]), bounds[1].maximum(every[:, 0])], 1)
        moved = torch.linalg.matrix_norm(resampled - rows, 2)
        turned = _rotated(rows, samples, g)
        null = torch.stack([moved, _shares(turned).amin(-1), sparsity(turned).mean(-1)])
        return cls(raw[0].norm(dim=-1), rows, every[:, 0], bounds, null)


def _least_singular(rows: Float[Tensor, "*sample feature d"]) -> Float[Tensor, "*sample"]:
    n, d = rows.shape[-2:]
    return torch.linalg.svdvals(rows)[..., -1] if n <= d else rows.new_zeros(rows.shape[:-2])


def _shares(rows: Float[Tensor, "*sample feature d"]) -> Float[Tensor, "*sample feature"]:
    return rows.square().amax(-1)


def sparsity(rows: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest"]:
    """Return Hoyer's sparsity of each row: 1 with one entry, 0 if all are equally large; NaN in one dimension."""
    d = rows.shape[-1]
    return (math.sqrt(d) - rows.abs().sum(-1) / rows.norm(dim=-1)) / (math.sqrt(d) - 1 if d > 1 else math.nan)


def _rotated(rows: Float[Tensor, "feature d"], samples: int, g: torch.Generator) -> Float[Tensor, "sample feature d"]:
    """Return the rows in random orthonormal bases, their angles to each other kept."""
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    return (u * s) @ rotation(rows.shape[1], g, columns=len(s), samples=(samples,), dtype=rows.dtype).mT


def _result(encoding: Encoding, seen: _Shares, there: Tensor, rows: _Rows, margin: float, least: float) -> Properties:
    names = [n for n, held in zip(encoding.features, there.tolist(), strict=True) if held]
    worst = seen.value.masked_fill(~there, -math.inf).argmax(1)
    both = torch.arange(2)
    value = torch.cat([seen.value[both, worst], rows.value]).float()
    interval = torch.cat([seen.interval[both, worst], rows.interval]).float()
    null = torch.cat([seen.null[:, there].amax(1), rows.null]).float()
    cosine = (rows.rows @ rows.rows.T).fill_diagonal_(-1.0).amax(1)
    twins = [n for n, c in zip(names, cosine.tolist(), strict=True) if c > _ONE_DIRECTION]
    verdict, why = _verdicts(value, interval, null, margin, least, rows.rows, twins)
    if len(names) < len(encoding.features):
        left = [n for n in encoding.features if n not in names]
        why["represented"] = f"not represented, and left out of properties: {', '.join(left)}"
    weights = rows.rows * rows.length[:, None]
    own = rows.length.square() / (rows.rows @ weights.T).square().sum(1)
    each = {"largest": _shares(rows.rows), "cosine": cosine, "dimensionality": own}
    full = {n: torch.full(there.shape, math.nan).masked_scatter(there, v.float()) for n, v in each.items()}
    shares = [s.float().masked_fill(~there, math.nan) for s in seen.value]
    if len(names) == 1:
        full["cosine"] = torch.full(there.shape, math.nan)
    return Properties(
        statistic=value,
        interval=interval,
        null=null,
        verdict=verdict,
        interaction=shares[0],
        curvature=shares[1],
        largest=full["largest"],
        cosine=full["cosine"],
        dimensionality=full["dimensionality"],
        represented=there.float(),
        labels={"property": list(ORDER), "feature": list(encoding.features), "bound": BOUNDS},
        units=_UNITS,
        reasons=why,
        record={"worst": {ORDER[k]: encoding.features[int(worst[k])] for k in (0, 1)}, "one direction": twins},
    )


def _verdicts(
    value: Tensor, interval: Tensor, null: Tensor, margin: float, least: float, rows: Tensor, twins: list[str]
) -> tuple[Float[Tensor, "property"], dict[str, str]]:
    """Return the verdicts in strict order, and why there is none."""
    out, why = torch.full((5,), math.nan), dict[str, str]()
    low, high = interval.unbind(1)
    top = null.amax(1)
    for k in (0, 1):
        if bool(high[k] < margin):
            out[k] = 1.0
        elif bool((low[k] > margin) & (value[k] > top[k])):
            out[k] = 0.0
        if k == 0 and twins and not bool(out[k] == 0):
            out[k] = 0.0
            why["decomposable"] = f"{' and '.join(twins)} are in one direction, and cannot be told apart"
        if not bool(out[k] == 1):
            undecided = "its interval holds the margin: more examples are needed"
            why |= {ORDER[k]: undecided} if bool(out[k].isnan()) else {}
            rest = "not asked: features that are not {} have no direction each"
            return out, why | dict.fromkeys(ORDER[k + 1 :], rest.format(ORDER[k]))
    n, d = rows.shape
    noise = null[2].quantile(0.95)
    if n > d or bool(value[2] <= noise):
        out[2] = 1.0
        why |= {"superposed": f"{n} directions in {d} dimensions depend on each other"} if n > d else {}
    elif bool(low[2] > noise):
        out[2] = 0.0
    else:
        why["superposed"] = "its interval reaches into the noise: more examples are needed"
    out[4] = float(bool((low[4] > top[4]) & (value[4] > null[4].mean() + _SPARSER)))
    alone = len(set(rows.abs().argmax(1).tolist())) == n
    if bool(out[2] == 1):
        out[3] = 0.0
        why["basis_aligned"] = "superposed features have no dimension each"
    elif bool(out[2].isnan()):
        why["basis_aligned"] = "not asked: it is undecided if they are superposed"
    elif alone and bool((low[3] >= least) & (value[3] > top[3])):
        out[3] = 1.0
    elif not alone or bool(value[3] <= top[3]) or bool(high[3] < least):
        out[3] = 0.0
    else:
        why["basis_aligned"] = f"its interval holds {least:g}: more examples are needed"
    return out, why
