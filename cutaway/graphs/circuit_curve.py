"""How much of the answer do the largest nodes of a feature circuit carry, and what is left without them?

Faithfulness and completeness over thresholds (Marks et al. 2024, arXiv:2403.19647; Wang et al. 2023, arXiv:2211.00593).
Nodes of `graphs.feature_circuit` are ranked by |effect|; C is the first k of them, k from none to all.

* `faithfulness` = (m(C) − m(∅)) / (m(M) − m(∅)): m(C) with every node outside C, at every site, at its `baseline`; m(∅)
  with all nodes there, errors too; m(M) of the model itself. `completeness`: the same of the complement of C, so that a
  complete circuit leaves 0. Both are ratios of means over the clean prompts.
* `baseline`: the mean at each position over the corrupt prompts of the same length, as in the paper's code (whose
  effects mean a zero by the same argument); of the clean prompts; or zero.
* `errors`: `default` ranks them among the nodes, `keep` leaves them in C and in its complement, `remove` in neither.
  `errors_only`: all errors and no latent. Where it is high, the circuit is what the dictionaries do not explain.
* `neurons`: the same number of coordinates of the same sites, ranked by the same estimate, without dictionary or error.
  Control (`null`, `completeness_null`): as many nodes that move, drawn at random.
* Ranking and curve use different prompts: the ranking one half (task.split(0.5, seed=0)), the curve and its intervals
  the other. Prompts too few to split serve for both, and the record says so.
* `interval`, `completeness_interval`, `neurons_interval`, `errors_only_interval`: 95 %, over prompts. `threshold` is
  the smallest |effect| in C.
* Known failures: with most nodes outside it is a model that nobody trained, and ratios above 1 and below 0 happen. What
  passes no site of a dictionary stays in every circuit. A curve no higher than that of random nodes says that the
  ranking found nothing.
* Equivalences (tests): with all nodes m(C) = m(M) and the complement is m(∅); with errors kept, the first step is
  `errors_only`; a dictionary that is the identity gives `neurons`.
* Cost: 8 forwards and 1 backward, `steps` of both a site, and 3 + 2 samples forwards a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, one_prompt, ratio_interval
from cutaway.dictionaries.subject import Dictionaries
from cutaway.graphs.complement import BASELINES, BaselineKind, ablate_complement, baselines
from cutaway.graphs.node_effects import NodeEffects, estimated, node_effects
from cutaway.graphs.submodules import Submodule, neurons, submodules
from cutaway.interventions.halves import halves
from cutaway.models.edits.edit import Edit
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

Errors = Literal["default", "keep", "remove"]


@dataclass(frozen=True, kw_only=True)
class CircuitCurve(Result, kind="circuit_curve"):
    """Faithfulness and completeness of the first k nodes of a ranking, beside random nodes, neurons and errors.

    Attributes:
        faithfulness: the share of the metric's difference that the circuit has, with all else at the baseline.
        interval: of `faithfulness`, 95 %, over prompts.
        null: the same for as many random nodes.
        completeness: the share that is left in the circuit's complement.
        neurons: the faithfulness of as many neurons.
        errors_only: that of all errors without a latent.
        threshold: the smallest |effect| in the circuit.
        whole: the metric of the model itself.
        empty: the metric with all nodes at the baseline.
    """

    page: ClassVar[tuple[str, ...]] = ("completeness", "neurons")
    faithfulness: Float[Tensor, "step"]
    interval: Float[Tensor, "step bound"]
    null: Float[Tensor, "step sample"]
    completeness: Float[Tensor, "step"]
    completeness_interval: Float[Tensor, "step bound"]
    completeness_null: Float[Tensor, "step sample"]
    neurons: Float[Tensor, "step"]
    neurons_interval: Float[Tensor, "step bound"]
    errors_only: Float[Tensor, ""]
    errors_only_interval: Float[Tensor, "bound"]
    threshold: Float[Tensor, "step"]
    whole: Float[Tensor, ""]
    empty: Float[Tensor, ""]


@method(
    answers="How much of the answer do the largest nodes of a feature circuit carry, and what is left without them?",
    paper="Marks et al. 2024, arXiv:2403.19647",
    cost="prompts * ((8 + steps * blocks + step * (3 + 2 * samples)) * F + (1 + steps * blocks) * B)",
    control="random_nodes",
    rung="interventional",
)
def circuit_curve(
    model: Model,
    task: Task,
    autoencoders: Dictionaries,
    /,
    *,
    sizes: int = 8,
    errors: Errors = "default",
    baseline: BaselineKind = "corrupt_mean",
    steps: int = 0,
    samples: int = 10,
    seed: int = 0,
) -> CircuitCurve:
    """Measure circuits of growing size, and their complements.

    Args:
        sizes: how many sizes between no node and all nodes, in equal ratios.
        errors: errors are ranked like latents, always kept, or always removed.
        baseline: what stands outside of the circuit.
        steps: steps of integrated gradients for the ranking; 0 for one gradient.
        samples: how many random sets of nodes stand beside each size.
        seed: of the random sets.

    Raises:
        Refused: a dictionary whose latents are no nodes, a corruption that does not change the metric, or one that
            leaves it as it is with all nodes at their baseline.
    """
    subs = submodules(model, autoencoders)
    first, second, split = halves(task)
    found = node_effects(model, task, first.bind(model), subs, steps=steps)
    plain = estimated(found.runs, neurons(subs), found.slopes, "all", 1, 0)
    plan = _Plan.of(found, plain, sizes, errors, samples, seed)
    held = second.bind(model)
    parts = [_measured(model, part, subs, plan, baseline) for part in held.buckets()]
    whole = torch.cat([w for w, _ in parts])
    values = torch.cat([v for _, v in parts], 1)
    return _result(plan, held, whole, values, {"split": split, "baseline": BASELINES[baseline]})


@dataclass(frozen=True, eq=False)
class _Plan:
    """Sets of nodes that are measured.

    Attributes:
        counts: the number of ranked nodes in each circuit.
        threshold: the smallest |effect| among them.
        sets: the nodes of each variant: none, all errors, circuits, complements, random circuits, their complements.
        neurons: the neurons of each size.
        samples: the number of random sets.
        moving: the number of nodes that move.
        columns: the number of neurons.
    """

    counts: list[int]
    threshold: Float[Tensor, "step"]
    sets: list[Bool[Tensor, "node"]]
    neurons: list[Bool[Tensor, "neuron"]]
    samples: int
    moving: int
    columns: int

    @classmethod
    def of(cls, found: NodeEffects, plain: NodeEffects, sizes: int, errors: Errors, samples: int, seed: int) -> _Plan:
        error = found.errors()
        ranked = torch.ones_like(error) if errors == "default" else ~error
        size = found.effect.mean(0).abs()
        order = _first(size, ranked)
        pool = (found.moves() & ranked).nonzero()[:, 0]
        between = torch.logspace(0, 1, max(sizes, 1), base=max(len(pool), 1)).round().int().tolist()
        counts = sorted({0, *between, len(order)})
        if not len(pool):
            raise Refused("circuit curve", "no node differs between the two runs", "use prompts that differ")
        always = error & (errors == "keep")
        never = error & (errors == "remove")
        chosen = [_set(order[:k], always) for k in counts]
        drawn = [pool[torch.randperm(len(pool), generator=generator(seed + s))] for s in range(samples)]
        chance = [_set(d[:k] if k <= len(d) else order, always) for k in counts for d in drawn]
        sets = [torch.zeros_like(error), error]
        sets += [*chosen, *((~c & ~never) | always for c in chosen), *chance, *((~c & ~never) | always for c in chance)]
        columns = _first(plain.effect.mean(0).abs(), ~plain.errors())
        others = [_set(columns[:k] if k < len(order) else columns, plain.errors()) for k in counts]
        sorted_sizes = torch.cat([torch.full((1,), torch.inf), size[order]])
        return cls(counts, sorted_sizes[counts], sets, others, samples, len(pool), len(columns))


def _first(size: Float[Tensor, "node"], among: Bool[Tensor, "node"]) -> Int[Tensor, "ranked"]:
    """Return the nodes among some, the largest first."""
    chosen = among.nonzero()[:, 0]
    return chosen[size[chosen].argsort(descending=True, stable=True)]


def _set(nodes: Int[Tensor, "chosen"], always: Bool[Tensor, "node"]) -> Bool[Tensor, "node"]:
    out = always.clone()
    out[nodes] = True
    return out


def _measured(
    model: Model, part: Bound, subs: Sequence[Submodule], plan: _Plan, how: BaselineKind
) -> tuple[Float[Tensor, "prompt"], Float[Tensor, "variant prompt"]]:
    """Return the metric of the model and of every set of nodes, on prompts of one length."""
    with torch.no_grad():
        stands, plain = baselines(model, subs, part, how), baselines(model, neurons(subs), part, how)
    variants: list[list[Edit]] = [ablate_complement(stands, s) for s in plan.sets]
    variants += [ablate_complement(plain, s) for s in plan.neurons]
    whole = model.measure(part.clean, part.measure).float().cpu()
    return whole, sweep(model, part.clean, variants, part.measure).float().cpu()


def _result(
    plan: _Plan,
    held: Bound,
    whole: Float[Tensor, "prompt"],
    values: Float[Tensor, "variant prompt"],
    says: dict[str, Any],
) -> CircuitCurve:
    steps, n, empty = len(plan.counts), plan.samples, values[0]
    below = whole - empty
    if abs(float(below.mean())) < 1e-6:
        why = "the metric is the same with all nodes at their baseline"
        raise Refused("circuit curve", why, ("choose another ", Keyword("baseline")))
    ratio, interval = _ratios(values[1:] - empty, below)
    circuits, complements, chance, others, cells = ratio[1:].split([steps, steps, n * steps, n * steps, steps])
    bounds = interval[1:].split([steps, steps, n * steps, n * steps, steps])
    shares = (
        "faithfulness",
        "interval",
        "null",
        "completeness",
        "completeness_interval",
        "completeness_null",
        "neurons",
    )
    return CircuitCurve(
        faithfulness=circuits,
        interval=bounds[0],
        null=chance.reshape(steps, n),
        completeness=complements,
        completeness_interval=bounds[1],
        completeness_null=others.reshape(steps, n),
        neurons=cells,
        neurons_interval=bounds[4],
        errors_only=ratio[0],
        errors_only_interval=interval[0],
        threshold=plan.threshold,
        whole=whole.mean(),
        empty=empty.mean(),
        labels={"step": [str(k) for k in plan.counts], "bound": BOUNDS},
        units=dict.fromkeys(
            [*shares, "neurons_interval", "errors_only", "errors_only_interval"], "share of m(M) − m(∅)"
        )
        | dict.fromkeys(("threshold", "whole", "empty"), held.unit),
        reasons=one_prompt(len(held), "faithfulness", "completeness", "neurons", "errors_only"),
        record=says
        | {"nodes": {"that move": plan.moving, "neurons": plan.columns}, "step": "ranked nodes in the circuit"},
    )


def _ratios(
    above: Float[Tensor, "variant prompt"], below: Float[Tensor, "prompt"]
) -> tuple[Float[Tensor, "variant"], Float[Tensor, "variant bound"]]:
    """Return the ratio of means of every variant, and its interval."""
    ratio = above.mean(1) / below.mean()
    return ratio, ratio_interval(above.T, below[:, None].expand(-1, len(above)))
