"""How does the answer fade as more and more components are removed?

Knockout curve (Wang et al. 2023, arXiv:2211.00593, greedy sets; deletion curves: Samek et al. 2017): components are
ranked by how much their removal alone costs, and the top k are removed together, k = 0 … K.

* `metric[step]`: the task's metric after removing the first k components, mean over prompts; `accuracy[step]`: the
  share of prompts whose top prediction is still the answer. The labels of `step` name what is removed at each step.
* `order`: `single` ranks by the effect of removing each alone; `greedy` takes at each step the component whose removal,
  on top of those already gone, costs most, so that backups are found where they wake up.
* Ranking and curve use different prompts: the ranking one half (task.split(0.5, seed=0)), the curve and its intervals
  the other half. Prompts too few to split serve for both, and the record says so.
* `interval`, `accuracy_interval`: 95 %, over prompts. Control (`null`, `accuracy_null`): random sets of k
  components outside the top k, as many heads of each layer as far as these reach, else as many of any layer, else with
  some of the top k; the record says which at which steps.
* Known failures: order matters where components stand in for each other; a curve that falls no faster than the random
  sets says that the ranking found nothing, and one that falls says nothing about what the components do.
* Equivalences (tests): step 0 is the clean run; step 1 is the strongest single removal; with every component the
  random sets are the same set.
* Cost: one forward a component for the ranking (greedy: K times that), then 1 + samples a step; four times
  the forwards, but those of the random sets, with `resample`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.progress import part
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt, share_interval
from cutaway.interventions.ablation_values import Baseline, Removal, removal
from cutaway.interventions.components import all_components, random_sets
from cutaway.interventions.halves import halves
from cutaway.models.model import Model
from cutaway.tasks.task import Task

_SHARES = ("accuracy", "accuracy_interval", "accuracy_null")


@dataclass(frozen=True, kw_only=True)
class KnockoutCurve(Result, kind="knockout_curve"):
    """The metric and the accuracy after removing the first k components of a ranking, beside random sets."""

    metric: Float[Tensor, "step"]
    interval: Float[Tensor, "step bound"]
    null: Float[Tensor, "step sample"]
    accuracy: Float[Tensor, "step"]
    accuracy_interval: Float[Tensor, "step bound"]
    accuracy_null: Float[Tensor, "step sample"]


@method(
    answers="How does the answer fade as more and more components are removed?",
    paper="Wang et al. 2023, arXiv:2211.00593; Samek et al. 2017",
    cost="prompts * (6 + (layers * (heads + 1) * (step if order == 'greedy' else 1) + step)"
    " * (4 if how == 'resample' else 1) + step * samples) * F",
    control="random_sets",
    rung="interventional",
)
def knockout_curve(
    model: Model,
    task: Task,
    /,
    *,
    top: int = 10,
    order: Literal["single", "greedy"] = "single",
    mlps: bool = False,
    how: Baseline = "corrupt",
    samples: int = 20,
    seed: int = 0,
) -> KnockoutCurve:
    """Remove the top k heads, for growing k.

    Args:
        top: how many components to remove at most.
        order: rank by single effects, or greedily on top of what is already removed.
        mlps: rank MLPs among the heads.
        how: what stands in for the removed values.
        samples: how many random sets make the null of each step.
        seed: of the donors and the random sets.

    Raises:
        Refused: a baseline that these prompts do not allow, or nothing to remove.
    """
    if top < 1:
        raise Refused(
            Call("knockout_curve", {"top": top}), "nothing would be removed", "ask for at least one component"
        )
    pool = all_components(model, mlps)
    first, second, split = halves(task)
    ranking, held = first.bind(model), second.bind(model)
    chooser = removal(model, ranking, pool, how, seed)
    ranked = _greedy(model, chooser, pool, min(top, len(pool))) if order == "greedy" else _ranked(model, chooser, pool)
    ranked = ranked[: min(top, len(pool))]
    r, steps = removal(model, held, pool, how, seed), len(ranked) + 1
    drawn, matched = _random(pool, ranked, samples, seed)
    chance = [[r.edit(a, donor) for a in places] for step in drawn for donor, places in enumerate(step)]
    curve, others = r.swept(
        model,
        lambda donor: [[r.edit(a, donor) for a in ranked[:k]] for k in range(steps)],
        chance,
        r.bound.measure_with("accuracy", model),
    )  # variant prompt (metric, accuracy)
    random = others.mean(1).reshape(steps, samples, 2)
    unit = held.unit
    return KnockoutCurve(
        metric=curve[..., 0].mean(1),
        interval=mean_interval(curve[..., 0].T),
        null=random[..., 0],
        accuracy=curve[..., 1].mean(1),
        accuracy_interval=share_interval(curve[..., 1].T),
        accuracy_null=random[..., 1],
        labels={"step": ["nothing", *map(str, ranked)], "bound": BOUNDS},
        units={"metric": unit, "interval": unit, "null": unit} | dict.fromkeys(_SHARES, "share of prompts"),
        reasons=one_prompt(len(r.bound), "metric"),
        record=r.record() | {"split": split, "pool": len(pool), "random sets": matched},
    )


def _ranked(model: Model, r: Removal, pool: list[Address]) -> list[Address]:
    """Return the components, most costly removal first."""
    values, _ = r.swept(model, lambda donor: [[r.edit(a, donor)] for a in pool])
    return [pool[i] for i in values.mean(1).argsort(stable=True).tolist()]


def _greedy(model: Model, r: Removal, pool: list[Address], top: int) -> list[Address]:
    gone: list[Address] = []
    for step in range(top):
        left = [a for a in pool if a not in gone]
        sets = [[*gone, a] for a in left]
        with part(step, top):
            values, _ = r.swept(model, lambda donor, sets=sets: [[r.edit(a, donor) for a in s] for s in sets])
        gone.append(left[int(values.mean(1).argmin())])
    return gone


def _random(
    pool: list[Address], ranked: list[Address], samples: int, seed: int
) -> tuple[list[list[list[Address]]], dict[str, str]]:
    """Random sets for every step, and how they are matched at which steps."""
    sets, says = list[list[list[Address]]](), list[str]()
    for k in range(len(ranked) + 1):
        if 2 * k <= len(pool):
            drawn, how = random_sets(pool, ranked[:k], samples, seed + k)
        else:
            drawn = [_mixed(pool, ranked[:k], seed * samples + s) for s in range(samples)]
            how = "as many, with removed ones where the others are too few"
        sets.append(drawn)
        says.append(how)
    return sets, {f"{says.index(h)} to {len(says) - 1 - says[::-1].index(h)}": h for h in dict.fromkeys(says)}


def _mixed(pool: list[Address], removed: Sequence[Address], seed: int) -> list[Address]:
    """As many components as were removed: all others, and some of the removed."""
    mixed = [pool[i] for i in torch.randperm(len(pool), generator=generator(seed)).tolist()]
    return sorted(mixed, key=lambda a: a in removed)[: len(removed)]
