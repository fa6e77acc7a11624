"""Does a circuit lack parts: does it go on like the model when some of its components are cut in both?

Completeness (Wang et al. 2023, arXiv:2211.00593). For random subsets K of a circuit's components, F(C ∖ K) is
compared with F(M ∖ K): the same components are cut in the circuit, whose complement is cut too, and in the model. A
circuit that lacks backups of its own components goes on worse than the model does.

* `gap` = (F(M ∖ K) − F(C ∖ K)) / (m(M) − m(∅)) for every subset; the first is empty: its gap is 1 − faithfulness.
  `circuit` and `model` are the two, as shares. Cutting a component cuts all edges into and out of it.
* Components are the heads and MLPs that the circuit hears; each is in K with probability ½.
* `interval`: 95 %, over prompts. Control (`null`): the gaps of random circuits of as many edges between each two sites
  of each two layers, with subsets of their own components.
* Known failures: subsets are drawn, and another may be the worst (`circuits.certify` searches the complement).
* Equivalences (tests): the model as a circuit has no gap; the empty subset is `circuits.faithfulness`; masks by hand.
* Cost: 2 forwards for the ends and the alternative, and 2 (1 + draws) a circuit, of which there are 1 + samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.circuit import Circuit, matched
from cutaway.circuits.components import belongs, inside, without
from cutaway.circuits.evaluation import Evaluation, shares
from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, one_prompt
from cutaway.interventions.ablation_values import Baseline
from cutaway.interventions.paired_runs import Direction
from cutaway.models.edits.wiring import Wiring
from cutaway.models.model import Model
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Completeness(Result, kind="circuit_completeness"):
    """Gaps between a circuit and the model when components of the circuit are cut in both.

    Attributes:
        gap: the model less the circuit, as a share of what all edges are worth.
        interval: of `gap`, 95 %, over prompts.
        null: the gaps of random circuits.
        circuit: the share of the answer that the circuit keeps without the subset.
        model: the share that the model keeps.
        whole: the metric of the model.
        empty: the metric with all edges cut.
    """

    page: ClassVar[tuple[str, ...]] = ("circuit", "model")
    gap: Float[Tensor, "subset"]
    interval: Float[Tensor, "subset bound"]
    null: Float[Tensor, "subset sample"]
    circuit: Float[Tensor, "subset"]
    circuit_interval: Float[Tensor, "subset bound"]
    model: Float[Tensor, "subset"]
    model_interval: Float[Tensor, "subset bound"]
    whole: Float[Tensor, ""]
    empty: Float[Tensor, ""]


@method(
    answers="Does a circuit lack parts: does it go on like the model when some of its components are cut in both?",
    paper="Wang et al. 2023, arXiv:2211.00593",
    cost="prompts * (4 + (4 if how == 'resample' else 1) * (2 + 2 * (1 + draws) * (1 + samples))) * F",
    control="random_circuits",
    rung="interventional",
)
def completeness(
    model: Model,
    task: Task,
    circuit: Circuit,
    /,
    *,
    how: Baseline = "corrupt",
    direction: Direction = "noise",
    draws: int = 8,
    samples: int = 4,
    seed: int = 0,
) -> Completeness:
    """Cut random subsets of a circuit's components in the circuit and in the model.

    Args:
        how: what stands in for a writer's value where an edge is cut.
        direction: noise keeps the circuit in the clean run, denoise gives it its clean values in the corrupt run.
        draws: how many subsets are drawn.
        samples: how many random circuits stand beside it.
        seed: of the subsets and the random circuits.

    Raises:
        Refused: an edge that the model does not have, a circuit without a component, or a metric that is the same with
            all edges cut.
    """
    x = Evaluation.of(model, task, how, direction, "all", seed)
    own = circuit.mask(x.wiring)
    circuits = [own, *(matched(x.wiring, own, seed + s) for s in range(samples))]
    masks = [m for c in circuits for m in _pairs(x.wiring, c, draws, seed)]
    values = x.values([*x.whole_and_empty(), *masks])[..., 0]
    gap = x.gap(values[0], values[1])
    n = 1 + draws
    each = values[2:].unflatten(0, (len(circuits), 2, n))  # [circuit, circuit or model, subset, prompt]
    off, bounds = shares((each[:, 1] - each[:, 0]).flatten(0, 1), torch.zeros_like(gap), gap)
    kept, intervals = shares(each[0].flatten(0, 1), values[1], gap)
    unit = "share of m(M) − m(∅)"
    fields = ("gap", "interval", "null", "circuit", "circuit_interval", "model", "model_interval")
    return Completeness(
        gap=off[:n],
        interval=bounds[:n],
        null=off[n:].reshape(samples, n).T.clone(),
        circuit=kept[:n],
        circuit_interval=intervals[:n],
        model=kept[n:],
        model_interval=intervals[n:],
        whole=values[0].mean(),
        empty=values[1].mean(),
        labels={"subset": _names(x.wiring, own, draws, seed), "bound": BOUNDS},
        units={**dict.fromkeys(fields, unit), **dict.fromkeys(("whole", "empty"), x.given.bound.unit)},
        reasons=one_prompt(len(x), "gap", "circuit", "model"),
        record=x.record() | {"edges": int(own.sum()), "components": len(inside(x.wiring, own))},
    )


def _subsets(wiring: Wiring, mask: Bool[Tensor, "writer reader"], draws: int, seed: int) -> list[list[int]]:
    """Return the empty subset of a circuit's components, and random ones."""
    members, chance = inside(wiring, mask), generator(seed)
    drawn = [(torch.rand(len(members), generator=chance) < 0.5).tolist() for _ in range(draws)]
    return [[], *([m for m, on in zip(members, flags, strict=True) if on] for flags in drawn)]


def _pairs(
    wiring: Wiring, mask: Bool[Tensor, "writer reader"], draws: int, seed: int
) -> list[Bool[Tensor, "writer reader"]]:
    """Return the circuit without each subset, then the model without each."""
    subsets, of = _subsets(wiring, mask, draws, seed), belongs(wiring)
    return [without(of, m, s) for m in (mask, wiring.heard) for s in subsets]


def _names(wiring: Wiring, mask: Bool[Tensor, "writer reader"], draws: int, seed: int) -> list[str]:
    subsets = _subsets(wiring, mask, draws, seed)
    return ["none cut", *(f"{len(s)} cut, {n}" for n, s in enumerate(subsets[1:], 1))]
