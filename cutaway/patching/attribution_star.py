"""Which places does attribution patching miss where attention is saturated or effects cancel?

AtP* (Kramár et al. 2024, arXiv:2403.00745): two repairs of attribution patching's false negatives.

* QK-fix: for queries and keys the pattern is computed exactly with the donor's values (one forward for all of them,
  every layer reading its own unpatched stream), and only what follows is linear: `effect` = Σ ∂metric/∂pattern ·
  (pattern with the donor's queries or keys − pattern). A saturated softmax has no slope, but it moves. At other sites
  `effect` is that of `patching.attribution`.
* `by` cuts sites as there: the paper's nodes are a head's query, key or value at one position (`by="both"`). A query
  moves only its own row of the pattern. A key moves every row that reads it; what the softmax makes of one changed
  score follows in closed form, so all positions still cost one forward. All of a head's keys changed at once (the
  default) are recomputed together, which is not the sum over positions.
* GradDrop: one backward a layer in which nothing flows back through that layer's attention and MLP. `score` = mean over
  these layers and the prompts of |effect|, leaving out the layer whose outputs the place itself feeds: a place whose
  direct and indirect effect cancel keeps its score. `score` is for ranking, `effect` has sign and unit.
* `interval`, `score_interval`: 95 %, over prompts. Control (`null`, `score_null`): the same estimates for a donor
  in a random direction at the donor's distance, the pattern recomputed for it too.
* Audit: as in `patching.attribution`, its places chosen by `score`; `agreement` has the Spearman correlation of `score`
  with |exact| too.
* Known failures: what is nonlinear after the pattern stays linear here. Sizes of `score` are no effects.
* Equivalences (tests): at z, `effect` is that of `patching.attribution`; at q and k for small steps too; in a last
  layer with nothing nonlinear after it the QK-fix is exact, at each position too.
* Cost: as attribution patching, with one backward a layer more, and for q and k one forward for the fix and one for
  every sample of the null, pattern by pattern. Prompts go in parts of a bounded size, halved where memory runs out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address, Pattern
from cutaway.core.method import method
from cutaway.core.stats import mean_interval
from cutaway.interventions.audit import STATISTICS, Audit, agreement, rounding
from cutaway.interventions.effects import Effects
from cutaway.interventions.first_order import (
    ESTIMATED,
    EstimateRule,
    Nodes,
    Step,
    audited,
    estimate_record,
    estimates,
    fields,
    reasons,
    tangent,
    units,
)
from cutaway.interventions.grid import By
from cutaway.interventions.paired_runs import Direction, PairedRuns
from cutaway.models.access.backward import Cut
from cutaway.models.access.capture import Activations
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.tasks.task import Task

_FIXED = ("q", "k")
_OUTPUTS = ("attn_out", "mlp_out")
_STATISTICS = [*STATISTICS, "spearman of score"]
_SURE = 80.0  # in logs: beyond it a softmax gives all or nothing


@method(
    answers="Which places does attribution patching miss where attention is saturated or effects cancel?",
    paper="Kramár et al. 2024, arXiv:2403.00745",
    cost="prompts * ((4 + min(audit, cells) * (1 + samples * exact_null) + (1 + samples) * max(node, 1)) * F"
    " + (1 + layers) * B)",
    control="random_direction",
    rung="interventional",
    fills=("score", *ESTIMATED),
)
def attribution_star(
    model: Model,
    task: Task,
    /,
    *,
    site: tuple[Pattern, ...] = ("q",),
    by: By = "auto",
    direction: Direction = "denoise",
    audit: int = 24,
    exact_null: bool = False,
    samples: int = 4,
    seed: int = 0,
) -> Effects:
    """Estimate effects with exact attention and without cancellation between layers.

    Args:
        site: a pattern such as q, resid_pre, k.5 or z.2.1@-1, or several; q and k get the QK-fix.
        by: cut a site by position, by unit (head or neuron), or by both; auto takes units where there are any.
        direction: denoise patches clean values into the corrupt run, noise corrupt values into the clean run.
        audit: at how many places the exact effect is measured beside the estimate.
        exact_null: measure random steps at the audited places, too: the null of the exact effects.
        samples: how many random donors at the donor's distance make the null of each place.
        seed: of the random donors and of the audit's places.

    Raises:
        Refused: a place that cannot be exchanged, or a corruption that does not change the metric.
    """
    layers = range(model.shape.n_layers)
    cuts: list[Cut] = [(), *([a for a in model.places(_OUTPUTS) if a.layer == i] for i in layers)]

    def rule(nodes: list[Nodes]) -> EstimateRule:
        fixed = [n for n in nodes if n.site in _FIXED]
        one_key = any(n.site == "k" and n.placed for n in fixed)
        beside = [*(["pattern", "resid_pre"] if fixed else []), *(["scores"] if one_key else [])]
        return EstimateRule(_taken, _effect_and_score, beside, cuts)

    found = estimates(model, task, site, by, direction, rule, samples, seed)
    effect, score = found.values.mean(-1)
    done = audited(model, found, effect, audit, score, seed, samples if exact_null else 0)
    out = fields(found, done)
    out |= {
        "score": score.reshape(found.shape),
        "score_interval": mean_interval(found.values[1].T).reshape(*found.shape, 2),
        "score_null": found.null[1].reshape(*found.shape, -1),
    }
    out |= _checked(done, score, rounding(model, torch.stack([found.clean, found.corrupt])))
    record = estimate_record(found, done, "score") | {"QK-fix": any(n.site in _FIXED for n in found.nodes)}
    labels = found.labels(_STATISTICS if done else ())
    why = reasons(found, out)
    return Effects(grid=found.axes, **out, labels=labels, units=units(found, out), reasons=why, record=record)


def _taken(model: Model, x: PairedRuns, n: Nodes, donor: Mapping[str, Tensor]) -> Step:
    """Return products for one donor: behind the pattern for queries and keys, elsewhere at the places themselves."""
    if n.site not in _FIXED:
        return tangent(model, x, n, donor)
    behind = _one_key if n.site == "k" and n.placed else _together
    return behind(model, x, n, donor)


def _together(model: Model, x: PairedRuns, n: Nodes, donor: Mapping[str, Tensor]) -> Step:
    """With the donor's queries, every position by itself; or with all of the donor's keys at once."""
    moved = {a: new.float() - x.own[str(there)].float() for a, there, new in _new(model, x, n, donor, "pattern")}

    def step(slope: Activations) -> Mapping[Address, Tensor]:
        each = {a: slope[str(Address("pattern", a.layer))].float() * m for a, m in moved.items()}
        if n.site == "q":
            return {a: _as_site(e.sum(-1)) for a, e in each.items()}
        return {a: _as_site(_shared(x, a, e.sum((-1, -2)))[..., None]) for a, e in each.items()}

    return step


def _one_key(model: Model, x: PairedRuns, n: Nodes, donor: Mapping[str, Tensor]) -> Step:
    """With the donor's key of one position at a time.

    Where key j's score rises by Δ, its probability p rises to p e^Δ / D and all others fall to 1 / D of theirs, with
    D = 1 − p + p e^Δ: an effect of (p e^Δ − p) / D · (slope_j − Σ slope · pattern) in every row.
    """
    moved: dict[Address, _Moved] = {}
    for a, there, new in _new(model, x, n, donor, "scores"):
        scores = x.own[str(there)].double()
        moved[a] = _Moved.of(scores, new.double(), x.own[str(Address("pattern", a.layer))])

    def step(slope: Activations) -> Mapping[Address, Tensor]:
        each = {a: m.effect(slope[str(Address("pattern", a.layer))].double()) for a, m in moved.items()}
        return {a: _as_site(_shared(x, a, e.sum(-2).float())) for a, e in each.items()}

    return step


@dataclass(frozen=True)
class _Moved:
    """Patterns [batch head q_pos k_pos] in double precision, and what each key alone would do to its row.

    A probability close to 1 is stored by its distance to 1: the largest of each row (`top`) apart from the `others`,
    with the share of a `sink` outside the keys.
    """

    pattern: Tensor
    others: Tensor
    top: Tensor
    sink: Tensor
    share: Tensor

    @staticmethod
    def of(scores: Tensor, new: Tensor, seen: Tensor) -> _Moved:
        """From the softmax's argument before and after, and the pattern as the model has it."""
        sink = 1 - seen.double().sum(-1, keepdim=True)
        sink = torch.where(sink > scores.shape[-1] * torch.finfo(seen.dtype).eps, sink, 0.0)
        pattern = scores.softmax(-1) * (1 - sink)
        top = pattern.argmax(-1, keepdim=True)
        others = pattern.scatter(-1, top, 0.0)
        left = (1 - pattern).scatter(-1, top, others.sum(-1, keepdim=True) + sink)
        grown = (pattern.log() + (new - scores)).nan_to_num(-torch.inf).clamp_max(_SURE).exp()
        share = (grown - pattern) / (left + grown).clamp_min(torch.finfo(torch.double).tiny)
        return _Moved(pattern, others, top, sink, share)

    def effect(self, slope: Tensor) -> Tensor:
        """Σ slope · (pattern with this key changed − pattern), query by query and key by key."""
        best = slope.gather(-1, self.top)
        away = ((best - slope) * self.others).sum(-1, keepdim=True) + best * self.sink
        gap = (slope - (slope * self.pattern).sum(-1, keepdim=True)).scatter(-1, self.top, away)
        return self.share * gap


def _new(
    model: Model, x: PairedRuns, n: Nodes, donor: Mapping[str, Tensor], site: str
) -> list[tuple[Address, Address, Tensor]]:
    """Return every layer's scores or pattern with the donor's queries or keys, and nothing else changed."""
    streams = [str(Address("resid_pre", a.layer)) for a in n.whole]
    edits = [*(Replace(s, x.own[s]) for s in streams), *(Replace(a, donor[str(a)]) for a in n.whole)]
    there = [Address(site, a.layer) for a in n.whole]
    new = model.capture(x.target, there, edits=edits, logits=False)
    return [(a, t, new[str(t)]) for a, t in zip(n.whole, there, strict=True)]


def _shared(
    x: PairedRuns, a: Address, each: Float[Tensor, "prompt head *rest"]
) -> Float[Tensor, "prompt kv_head *rest"]:
    """Return a key's effects counted for all heads that share it."""
    return each.unflatten(1, (x.own[str(a)].shape[2], -1)).sum(2)


def _as_site(each: Float[Tensor, "prompt head place"]) -> Float[Tensor, "prompt place head 1"]:
    """In the axes of queries and keys."""
    return each.movedim(1, 2)[..., None]


def _effect_and_score(n: Nodes, each: Iterable[Float[Tensor, "cell prompt"]]) -> Float[Tensor, "quantity cell prompt"]:
    """Return the effect, and mean |effect| over the dropped layers; a place inside a layer's attention or MLP has
    none if that is dropped.
    """
    found = iter(each)
    effect = next(found)
    layers, outside = torch.tensor([a.layer for a in n.places]), n.site.startswith("resid")
    total, counts = torch.zeros_like(effect), torch.zeros(len(layers))
    for drop, left in enumerate(found):
        counted = (layers != drop).float() if not outside else torch.ones(len(layers))
        total, counts = total + left.abs() * counted.to(left.device)[:, None], counts + counted
    times = counts.to(effect.device)[:, None]
    return torch.stack([effect, torch.where(times > 0, total / times.clamp_min(1), effect.abs())])


def _checked(done: Audit | None, score: Float[Tensor, "cell"], least: float) -> dict[str, Tensor]:
    """Return the audit's statistics with that of the score."""
    if done is None:
        return {}
    chosen = list(done.sample.chosen)
    ranked = [t[1:2] for t in agreement(score[chosen], done.exact[chosen].abs(), done.sample, least)]
    return {
        "agreement": torch.cat([done.agreement, ranked[0]]),
        "agreement_interval": torch.cat([done.interval, ranked[1]]),
    }
