"""Which places does attribution patching miss, because attention is saturated or effects cancel?

AtP* (Kramár et al. 2024, arXiv:2403.00745): two repairs of attribution patching's false negatives.

* QK-fix: for queries and keys the pattern is computed exactly with the donor's values (one forward for all of them,
  every layer reading its own unpatched stream), and only what follows is linear: `effect` = Σ ∂metric/∂pattern ·
  (pattern with the donor's queries or keys − pattern). A saturated softmax has no slope, but it moves. At other sites
  `effect` is that of `patching.attribution`.
* GradDrop: one backward a layer in which nothing flows back through that layer's attention and MLP. `score` = mean over
  these layers and the prompts of |effect|, leaving out the layer whose outputs the place itself feeds: a place whose
  direct and indirect effect cancel keeps its score. `score` is for ranking, `effect` has sign and unit.
* `interval`: bootstrap over prompts, of `effect`. Control (`null`): the same estimate for a donor in a random direction
  at the donor's distance, the pattern recomputed for it too.
* Audit: `exact` is the measured effect at `audit` places, evenly over the ranks of `score` (NaN elsewhere);
  `agreement` has Pearson and Spearman correlation and the share of sign errors of `effect`, and the Spearman
  correlation of `score` with |exact|, with bootstrap intervals.
* Known failures: what is nonlinear after the pattern stays linear here. Sizes of `score` are no effects.
* Equivalences (tests): at z, `effect` is that of `patching.attribution`; at q and k for small steps too; in a last
  layer with nothing nonlinear after it the QK-fix is exact.
* Cost: as attribution patching, with one backward a layer more, and for q and k one forward for the fix and one for
  every sample of the null.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, bootstrap_mean, generator
from cutaway.models.capture import Activations
from cutaway.models.edits import Replace
from cutaway.models.model import Model
from cutaway.patching.audit import STATISTICS, Audit, agreement, rounding
from cutaway.patching.cells import Cells
from cutaway.patching.exchange import Direction, Exchange
from cutaway.patching.linear import audited, estimate, notes, random_donor, random_estimate, slopes, sums
from cutaway.tasks.task import Task

_FIXED = ("q", "k")
_OUTPUTS = ("attn_out", "mlp_out")
_STATISTICS = [*STATISTICS, "spearman of score"]


@dataclass(frozen=True, kw_only=True)
class HeadScores(Result, kind="head_scores"):
    """Estimated effect and ranking score of every head; `exact` is NaN where nothing was audited."""

    effect: Float[Tensor, "layer head"]
    score: Float[Tensor, "layer head"]
    interval: Float[Tensor, "layer head bound"]
    null: Float[Tensor, "layer head sample"]
    recovered: Float[Tensor, "layer head"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    exact: Float[Tensor, "layer head"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None


@dataclass(frozen=True, kw_only=True)
class PositionScores(Result, kind="position_scores"):
    """Estimated effect and ranking score of every layer and position; `exact` is NaN where nothing was audited."""

    effect: Float[Tensor, "layer position"]
    score: Float[Tensor, "layer position"]
    interval: Float[Tensor, "layer position bound"]
    null: Float[Tensor, "layer position sample"]
    recovered: Float[Tensor, "layer position"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    exact: Float[Tensor, "layer position"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None


@dataclass(frozen=True, kw_only=True)
class NeuronScores(Result, kind="neuron_scores"):
    """Estimated effect and ranking score of every neuron; `exact` is NaN where nothing was audited."""

    effect: Float[Tensor, "layer neuron"]
    score: Float[Tensor, "layer neuron"]
    interval: Float[Tensor, "layer neuron bound"]
    null: Float[Tensor, "layer neuron sample"]
    recovered: Float[Tensor, "layer neuron"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    exact: Float[Tensor, "layer neuron"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None


_BY_AXES: dict[tuple[str, ...], type[HeadScores | PositionScores | NeuronScores]] = {
    c.axes()["effect"]: c for c in (HeadScores, PositionScores, NeuronScores)
}


@method(
    answers="Which places does attribution patching miss, because attention is saturated or effects cancel?",
    paper="Kramár et al. 2024, arXiv:2403.00745",
    cost="prompts * ((5 + audit + samples) * F + (1 + layers) * B)",
    control="random_direction",
)
def attribution_star(
    model: Model,
    task: Task,
    /,
    *,
    site: str = "q",
    direction: Direction = "denoise",
    audit: int = 24,
    samples: int = 4,
    seed: int = 0,
) -> HeadScores | PositionScores | NeuronScores:
    """Estimate effects with exact attention and without cancellation between layers.

    Args:
        site: a head site (by layer and head) or a stream site (by layer and position); q and k get the QK-fix.
        direction: denoise patches clean values into the corrupt run, noise corrupt values into the clean run.
        audit: at how many places the exact effect is measured beside the estimate.
        samples: how many random donors at the donor's distance make the null of each place.
        seed: of the random donors and of the bootstrap.

    Raises:
        Refused: a site that is neither, or a corruption that does not change the metric.
    """
    fixed = site in _FIXED
    cuts = [[a for a in model.places(_OUTPUTS) if a.layer == i] for i in range(model.shape.n_layers)]
    beside = ("pattern", "resid_pre") if fixed else ()
    x, (n,), found = slopes(model, task, [site], direction, beside=beside, cuts=[(), *cuts])
    if fixed:
        moved = _moved(model, x, n, x.donor)
        each, *dropped = (_behind(n, moved, slope) for slope in found)
        null = _null(model, x, n, found[0], samples, seed)
    else:
        each, *dropped = (estimate(n, x.own, x.donor, slope) for slope in found)
        null = random_estimate(n, x.own, x.donor, found[0], samples, seed)
    mean, score = each.mean(-1), _score(n, each, torch.stack(dropped))
    done = audited(model, x, n.addresses(), mean.flatten(), audit, score.flatten())
    return _BY_AXES[n.axes](
        effect=mean,
        score=score,
        interval=bootstrap_mean(each.movedim(-1, 0), seed=seed),
        null=null,
        recovered=mean / x.gap,
        clean=x.clean.cpu(),
        corrupt=x.corrupt.cpu(),
        labels=n.labels() | {"bound": BOUNDS} | ({"statistic": _STATISTICS} if done else {}),
        units=dict.fromkeys(["effect", "score", "interval", "null", *(["exact"] if done else [])], x.bound.unit)
        | {"recovered": "share of clean − corrupt"},
        record=notes(x, done, mean.numel()) | {"QK-fix": fixed},
        **_checked(n, done, score.flatten(), rounding(model, x)),
    )


def _moved(model: Model, x: Exchange, n: Cells, donor: Mapping[str, Tensor]) -> list[Tensor]:
    """By how much every layer's pattern changes with the donor's queries or keys, and nothing else changed."""
    layers = [str(Address("resid_pre", i)) for i in n.layers]
    places = [str(Address(n.site, i)) for i in n.layers]
    edits = [*(Replace(a, x.own[a]) for a in layers), *(Replace(a, donor[a]) for a in places)]
    there = [Address("pattern", i) for i in n.layers]
    new = model.capture(x.target, there, edits=edits, logits=False)
    return [new[a].float() - x.own[a].float() for a in map(str, there)]


def _behind(n: Cells, moved: list[Tensor], slope: Activations) -> Float[Tensor, "layer head prompt"]:
    """Effects of changed patterns, linear from the pattern on; a key's counts for all heads that share it."""
    products = [slope[str(Address("pattern", i))].float() * step for i, step in zip(n.layers, moved, strict=True)]
    each = sums(replace(n, site="pattern"), products).cpu()
    return each.unflatten(1, (n.shape[1], -1)).sum(2)


def _null(
    model: Model, x: Exchange, n: Cells, slope: Activations, samples: int, seed: int
) -> Float[Tensor, "layer head sample"]:
    chance, out, places = generator(seed), [], [str(Address(n.site, i)) for i in n.layers]
    for _ in range(samples):
        drawn = {p: random_donor(x.own, x.donor, p, chance) for p in places}
        out.append(_behind(n, _moved(model, x, n, drawn), slope).mean(-1))
    return torch.stack(out, dim=-1)


def _score(
    n: Cells, each: Float[Tensor, "layer second prompt"], dropped: Float[Tensor, "drop layer second prompt"]
) -> Float[Tensor, "layer second"]:
    """Mean |effect| over the dropped layers; a place inside a layer's attention or MLP has none if that is dropped."""
    drops, layers = torch.arange(len(dropped)), torch.tensor(n.layers)
    counts = (drops[:, None] != layers) | torch.tensor(n.site.startswith("resid"))
    total = (dropped.abs() * counts[..., None, None]).sum(0) / counts.sum(0)[:, None, None].clamp_min(1)
    return torch.where(counts.any(0)[:, None, None], total, each.abs()).mean(-1)


def _checked(n: Cells, done: Audit | None, score: Float[Tensor, "node"], least: float) -> dict[str, Any]:
    if done is None:
        return {}
    chosen = list(done.chosen)
    ranked = [t[1:2] for t in agreement(score[chosen], done.exact[chosen].abs(), least)]
    return {
        "exact": done.exact.reshape(n.shape),
        "agreement": torch.cat([done.agreement, ranked[0]]),
        "agreement_interval": torch.cat([done.interval, ranked[1]]),
    }
