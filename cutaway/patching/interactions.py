"""Do two components do the same work, or does one need the other?

Ablation of pairs (Wang et al. 2023, arXiv:2211.00593, on backup heads; the interaction term of a two-factor design):
all pairs of a named set are removed together, and the joint effect is compared with the sum of the single ones.

* `effect[component, partner]` = joint − (single + single), mean over prompts, in the metric's unit. With single effects
  below zero: below zero means that the two stand in for each other (together they cost more than the sum); above zero
  means that one works through the other, or both feed one step. 0 is additive. The diagonal is 0.
* `joint[component, partner]` and `single[component]`: the effects themselves (the diagonal of `joint` is `single`).
* `interval`: 95 %, over prompts. Control (`null`): the interaction of random pairs of heads outside the set, the
  same draws beside every pair.
* Known failures: a saturating metric (probability, accuracy) makes interactions of its own; use logit_diff. Pairs see
  no redundancy of three (see knockout_curve, group).
* Equivalences (tests): symmetric; a pair of heads has the joint effect and the interaction that `group` gives it.
* Cost: one forward a component and a pair (four with `resample`), and three a random pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.interventions.ablation_values import Baseline, removal
from cutaway.interventions.components import all_components, components
from cutaway.models.model import Model
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Interactions(Result, kind="interactions"):
    """Differences between removing two components together and the sum of removing each."""

    effect: Float[Tensor, "component partner"]
    interval: Float[Tensor, "component partner bound"]
    null: Float[Tensor, "component partner sample"]
    joint: Float[Tensor, "component partner"]
    single: Float[Tensor, "component"]


@method(
    answers="Do two components do the same work, or does one need the other?",
    paper="Wang et al. 2023, arXiv:2211.00593",
    cost="prompts * (3 + 2 * component * (component + 1) + 3 * samples) * F",
    control="random_pairs",
    rung="interventional",
)
def interactions(
    model: Model,
    task: Task,
    /,
    *,
    heads: tuple[str, ...] = ("0.0", "0.1"),
    how: Baseline = "corrupt",
    samples: int = 20,
    seed: int = 0,
) -> Interactions:
    """Remove all pairs of a set of components.

    Args:
        heads: the set, as `layer.head` or `mlp_out.layer`: `9.6,9.9,mlp_out.0`.
        how: what stands in for the removed values.
        samples: how many random pairs of other heads make the null.
        seed: of the donors and the random pairs.

    Raises:
        Refused: fewer than two components, no such one, or a set that leaves no two heads for the null.
    """
    chosen = components(model, heads, least=2)
    bound, pool = task.bind(model), all_components(model, mlps=False)
    inside = [pool.index(a) for a in chosen if a in pool]
    rest = [a for i, a in enumerate(pool) if i not in set(inside)]
    drawn = _pairs(rest, samples, seed)
    r = removal(model, bound, [*chosen, *pool], how, seed)
    pairs = list(combinations(range(len(chosen)), 2))
    sets: list[list[Address]] = [[a] for a in chosen] + [[chosen[i], chosen[j]] for i, j in pairs]
    chance = [[r.edit(a, n) for a in places] for n, (a, b) in enumerate(drawn) for places in ([a], [b], [a, b])]
    values, others = r.swept(model, lambda donor: [[r.edit(a, donor) for a in places] for places in sets], chance)
    effects, random = values - r.clean.cpu(), (others - r.clean.cpu()).mean(-1).reshape(samples, 3)
    single, both = effects[: len(chosen)], effects[len(chosen) :]
    joint = torch.diag_embed(single.T)  # prompt component partner
    term = torch.zeros_like(joint)
    for (i, j), x in zip(pairs, both, strict=True):
        joint[:, i, j] = joint[:, j, i] = x
        term[:, i, j] = term[:, j, i] = x - single[i] - single[j]
    null = (random[:, 2] - random[:, 0] - random[:, 1]).expand(len(chosen), len(chosen), -1)
    names, unit = [str(a) for a in chosen], bound.unit
    return Interactions(
        effect=term.mean(0),
        interval=mean_interval(term),
        null=null.clone(),
        joint=joint.mean(0),
        single=single.mean(1),
        labels={"component": names, "partner": names, "bound": BOUNDS},
        units={"effect": unit, "interval": unit, "null": unit, "joint": unit, "single": unit},
        reasons=one_prompt(len(r.bound), "effect"),
        record=r.record()
        | {
            "random pairs": [f"{a} {b}" for a, b in drawn],
            "random pairs are": "of any layers, the same beside all pairs",
        },
    )


def _pairs(rest: list[Address], samples: int, seed: int) -> list[list[Address]]:
    """Draw random pairs out of the rest.

    Raises:
        Refused: the rest has fewer than two heads.
    """
    if len(rest) < 2:
        why = f"only {len(rest)} of the heads are left for the control"
        raise Refused("interactions of so many heads", why, "choose a smaller set")
    g = generator(seed)
    return [[rest[i] for i in torch.randperm(len(rest), generator=g)[:2].tolist()] for _ in range(samples)]
