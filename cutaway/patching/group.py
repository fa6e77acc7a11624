"""Does a set of components carry the difference together, more than random sets of the same size?

The named heads and MLPs are exchanged or removed at once, at all positions (Wang et al. 2023, arXiv:2211.00593, §4).
Single removals miss redundant components; the joint effect does not.

* `effect` = metric(with the set replaced) − metric(without), mean over prompts; `recovered` is its share of
  clean − corrupt. `single[component]` is the effect of replacing each alone.
* `direction="noise"`: in the clean run, `how` says what stands in: corrupt values by default, or those of `ablate`.
  `"denoise"` puts clean values into the corrupt run.
* `interaction` = joint effect − sum of the single effects. With single effects below zero: below zero where components
  stand in for each other, above zero where one works through another.
* `interval` and `…_interval`: 95 %, over prompts. Control (`null`): sets drawn from the others, as many heads of
  each layer and as many MLPs where enough are left, else as many of any layer; the record says which.
* The set must be named, unless published work knows it (`task.truth.components`).
* Known failures: a set found on these prompts looks better here than on others; in a layer most of whose heads are in
  the set, few random sets are left, and they repeat.
* Equivalences (tests): a set of one is activation patching, or `ablate`; all heads of a layer are its z.
* Cost: one forward a random set, and one (four with `resample`) for the set and each of its components.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Code, Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval, one_prompt
from cutaway.interventions.ablation_values import Baseline, removal
from cutaway.interventions.components import all_components, components, random_sets
from cutaway.interventions.paired_runs import Direction, corruption_record, difference
from cutaway.models.model import Model
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class GroupEffect(Result, kind="group_effect"):
    """Joint effect of exchanging or removing a set of components, beside that of random sets of the same size.

    Attributes:
        effect: the joint effect, mean over prompts.
        recovered: `effect` as a share of `gap`.
        interaction: `effect` minus the sum of the effects of each component alone.
        single: the effect of each component alone.
        gap: the mean of clean − corrupt.
    """

    effect: Float[Tensor, ""]
    interval: Float[Tensor, "bound"]
    null: Float[Tensor, "sample"]
    recovered: Float[Tensor, ""]
    interaction: Float[Tensor, ""]
    interaction_interval: Float[Tensor, "bound"]
    single: Float[Tensor, "component"]
    single_interval: Float[Tensor, "component bound"]
    gap: float | None = None


@method(
    answers="Does a set of components carry the difference together, more than random sets of the same size?",
    paper="Wang et al. 2023, arXiv:2211.00593",
    cost="prompts * (5 + sample + 4 * (1 + component)) * F",
    control="random_sets",
    rung="interventional",
)
def group(
    model: Model,
    task: Task,
    /,
    *,
    heads: tuple[str, ...] = (),
    how: Baseline = "corrupt",
    direction: Direction = "noise",
    samples: int = 20,
    seed: int = 0,
) -> GroupEffect:
    """Exchange or remove several components at once.

    Args:
        heads: the set, as `layer.head` or `mlp_out.layer`: `9.6,9.9,mlp_out.0`; if empty, those
            that published work found for this task in this model.
        how: what stands in for the values of the clean run.
        direction: noise replaces values of the clean run, denoise puts clean values into the corrupt run.
        samples: how many random sets of the same size make the null.
        seed: of the donors and the random sets.

    Raises:
        Refused: no set is named or known, no such component, a set so large that no random set of its size is left, a
            baseline that these prompts or this direction do not allow, or a corruption that does not change the metric.
    """
    chosen, known = _chosen(model, task, heads)
    pool = all_components(model, mlps=any(a.unit is None for a in chosen))
    random, matched = random_sets(pool, chosen, samples, seed)
    bound, denoise = task.bind(model), direction == "denoise"
    if denoise and how != "corrupt":
        why = "denoise removes nothing: it puts clean values into the corrupt run"
        raise Refused(
            ("group with ", Keyword("how", how), " and ", Keyword("direction", "denoise")),
            why,
            "leave one of the two out",
        )
    turned = replace(bound, clean=bound.corrupt, corrupt=bound.clean) if denoise else bound
    r = removal(model, turned, [*chosen, *pool], how, seed)
    before, other = r.clean.cpu(), model.measure(r.bound.corrupt, r.bound.measure).float().cpu()
    gap = difference(task, *((other, before) if denoise else (before, other)))
    values, drawn = r.swept(
        model,
        lambda donor: [[r.edit(a, donor) for a in places] for places in (chosen, *([a] for a in chosen))],
        [[r.edit(a, donor) for a in places] for donor, places in enumerate(random)],
    )
    joint, single = values[0] - before, (values[1:] - before).T  # prompt; prompt component
    term, unit = joint - single.sum(1), r.bound.unit
    said = {} if denoise else r.record()
    return GroupEffect(
        effect=joint.mean(),
        interval=mean_interval(joint),
        null=(drawn - before).mean(1),
        recovered=joint.mean() / gap,
        interaction=term.mean(),
        interaction_interval=mean_interval(term),
        single=single.mean(0),
        single_interval=mean_interval(single),
        gap=gap,
        labels={"component": [str(a) for a in chosen], "bound": BOUNDS},
        units={"recovered": "share of clean − corrupt"} | {n: unit for n in GroupEffect.schema() if n != "recovered"},
        reasons=one_prompt(len(r.bound), "effect", "interaction", "single"),
        record=said | corruption_record(task.corruption) | {"random sets": matched} | known,
    )


def _chosen(model: Model, task: Task, names: tuple[str, ...]) -> tuple[list[Address], dict[str, str]]:
    """Return the components named, else those known; and for the record where they are known from."""
    if names:
        return components(model, names), {}
    if task.truth is None or not task.truth.components:
        why = f"no circuit is known for task {task.name!r} in {model.name!r}"
        raise Refused(
            "a group without a set",
            why,
            ("name one, for example ", Keyword("heads", "3.1,mlp_out.4"), " (see ", Code("patching.ablate"), ")"),
        )
    return components(model, task.truth.components), {"set": f"known from {task.truth.source}"}
