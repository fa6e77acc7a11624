"""Does a set of heads carry the difference together, more than random sets of the same size?

The named heads are exchanged at once, at all positions, between the clean and the corrupt run (Wang et al. 2023,
arXiv:2211.00593, §4). Single patches miss redundant heads; the joint effect does not.

* `effect` = metric(patched) − metric(unpatched), mean over prompts; `recovered` is its share of clean − corrupt.
* `interval`: bootstrap over prompts. Control (`null`): sets of as many heads drawn from the others.
* `interaction` = joint effect − sum of the single effects: negative where heads stand in for each other.
* Cost: one forward a random set, and one a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, bootstrap_mean, matched_random
from cutaway.models.edits import Replace
from cutaway.models.executor import sweep
from cutaway.models.model import Model
from cutaway.patching.exchange import Direction, exchange, measured
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class GroupEffect(Result, kind="group_effect"):
    """Joint effect of exchanging a set of heads, beside that of random sets of the same size."""

    effect: Float[Tensor, ""]
    interval: Float[Tensor, "bound"]
    null: Float[Tensor, "sample"]
    recovered: Float[Tensor, ""]
    interaction: Float[Tensor, ""]
    single: Float[Tensor, "component"]


@method(
    answers="Does a set of heads carry the difference together, more than random sets of the same size?",
    paper="Wang et al. 2023, arXiv:2211.00593",
    cost="prompts * (5 + 1 + sample + component) * F",
    control="random_heads",
)
def group(
    model: Model, task: Task, /, *, heads: str = "0.0", direction: Direction = "noise", samples: int = 20, seed: int = 0
) -> GroupEffect:
    """Exchange several heads at once between the clean and the corrupt run.

    Args:
        heads: the set, as `layer.head` separated by commas: `9.6,9.9,10.0`.
        direction: noise patches corrupt values into the clean run, denoise clean values into the corrupt run.
        samples: how many random sets of the same size make the null.
        seed: of the random sets and of the bootstrap.

    Raises:
        Refused: no such head, or a set so large that no random set of its size is left.
    """
    chosen = model.places([f"z.{h.strip()}" for h in heads.split(",") if h.strip()])
    if not chosen or any(a.unit is None or a.position is not None for a in chosen):
        raise Refused(
            f"heads {heads!r}", "a set is written as layer.head, separated by commas", "write for example 3.1,5.2"
        )
    x = exchange(model, task, "z", direction)
    pool = [Address("z", i, h) for i in range(model.shape.n_layers) for h in range(model.shape.n_heads)]
    random = matched_random([pool.index(a) for a in chosen], len(pool), seed=seed, samples=samples)
    sets = [chosen, *([pool[i] for i in drawn] for drawn in random), *([a] for a in chosen)]
    variants = [[Replace(a, x.donor[str(a)]) for a in places] for places in sets]
    effects = (sweep(model, x.target, variants, measured(x.bound)) - x.baseline).float().cpu()
    joint, single = effects[0].mean(), effects[1 + samples :].mean(1)
    return GroupEffect(
        effect=joint,
        interval=bootstrap_mean(effects[0], seed=seed),
        null=effects[1 : 1 + samples].mean(1),
        recovered=joint / x.gap,
        interaction=joint - single.sum(),
        single=single,
        labels={"component": [str(a) for a in chosen], "bound": BOUNDS},
        units={"effect": x.bound.unit, "null": x.bound.unit, "single": x.bound.unit, "interaction": x.bound.unit},
        record=x.notes(),
    )
