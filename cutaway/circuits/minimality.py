"""Which components of a circuit are needed, alone or in place of each other?

Minimality (Wang et al. 2023, arXiv:2211.00593). A component without effect may be surplus, or may stand in for another
that is there: pairs tell the two apart.

* `effect` of a component = (F(C) − F(C without it)) / (m(M) − m(∅)), a share; cutting a component cuts all edges into
  and out of it. Positive where it helps the answer.
* `pair`: the same of two components cut together; `excess`: what the two do beyond the sum of each alone. Positive
  where they stand in for each other. Of more than `pairs` pairs, so many are drawn.
* `interval`, `pair_interval`, `excess_interval`: 95 %, over prompts. Control (`null`): what a component that is not in
  the circuit does when it is put in, with all its edges from and to the circuit's; so many as `samples`, the same for
  every row.
* Known failures: components that cancel each other in a third look needless here; small effects of many components add
  up. Intervals are of single components: of hundreds some are beside 0 by chance, which the null shows.
* Equivalences (tests): masks by hand; two copies of one head have no excess where they only add up.
* Cost: 2 forwards for the ends and the alternative, and one a component, pair and sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.circuit import Circuit
from cutaway.circuits.components import belongs, inside, touching, without
from cutaway.circuits.evaluation import Evaluation, shares
from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, one_prompt
from cutaway.interventions.ablation_values import Baseline
from cutaway.interventions.paired_runs import Direction
from cutaway.models.edits.wiring import Wiring
from cutaway.models.model import Model
from cutaway.tasks.task import Task

_SHARE = "share of m(M) − m(∅)"


@dataclass(frozen=True, kw_only=True)
class Minimality(Result, kind="circuit_minimality"):
    """Effects of a circuit's components and of pairs of them, within the circuit.

    Attributes:
        effect: what cutting each component takes from the answer, as a share of what all edges are worth.
        interval: of `effect`, 95 %, over prompts.
        null: what components outside of the circuit add when put in, the same for every row.
        pair: what cutting two components together takes.
        excess: `pair` less the effects of the two.
        kept: the faithfulness of the circuit.
        whole: the metric of the model.
        empty: the metric with all edges cut.
    """

    page: ClassVar[tuple[str, ...]] = ("excess",)
    effect: Float[Tensor, "component"]
    interval: Float[Tensor, "component bound"]
    null: Float[Tensor, "component sample"]
    pair: Float[Tensor, "pair"]
    pair_interval: Float[Tensor, "pair bound"]
    excess: Float[Tensor, "pair"]
    excess_interval: Float[Tensor, "pair bound"]
    kept: Float[Tensor, ""]
    kept_interval: Float[Tensor, "bound"]
    whole: Float[Tensor, ""]
    empty: Float[Tensor, ""]


@method(
    answers="Which components of a circuit are needed, alone or in place of each other?",
    paper="Wang et al. 2023, arXiv:2211.00593",
    cost="prompts * (4 + (4 if how == 'resample' else 1) * (3 + component + pair + samples)) * F",
    control="random_components",
    rung="interventional",
)
def minimality(
    model: Model,
    task: Task,
    circuit: Circuit,
    /,
    *,
    how: Baseline = "corrupt",
    direction: Direction = "noise",
    pairs: int = 64,
    samples: int = 8,
    seed: int = 0,
) -> Minimality:
    """Cut each component of a circuit, and pairs of them, within the circuit.

    Args:
        how: what stands in for a writer's value where an edge is cut.
        direction: noise keeps the circuit in the clean run, denoise gives it its clean values in the corrupt run.
        pairs: how many pairs are cut at most, drawn at random.
        samples: how many components from outside of the circuit are put in.
        seed: of the pairs and of these components.

    Raises:
        Refused: an edge that the model does not have, a circuit without a component, or a metric that is the same with
            all edges cut.
    """
    x = Evaluation.of(model, task, how, direction, "all", seed)
    own, of, chance = circuit.mask(x.wiring), belongs(x.wiring), generator(seed)
    members = inside(x.wiring, own)
    both = list(combinations(range(len(members)), 2))
    both = [both[i] for i in sorted(torch.randperm(len(both), generator=chance)[:pairs].tolist())]
    cut = [without(of, own, [m]) for m in members] + [without(of, own, [members[i], members[j]]) for i, j in both]
    grown = [own | _joined(x.wiring, own, w) for w in _outside(x.wiring, members, samples, chance)]
    values = x.values([*x.whole_and_empty(), own, *cut, *grown])[..., 0]
    gap, kept = x.gap(values[0], values[1]), values[2]
    zero, n = torch.zeros_like(gap), len(members)
    taken = kept - values[3 : 3 + len(cut)]
    effect, bounds = shares(taken, zero, gap)
    ends = torch.tensor(both, dtype=torch.long).reshape(-1, 2)
    excess, excess_bounds = shares(taken[n:] - taken[ends[:, 0]] - taken[ends[:, 1]], zero, gap)
    added, _ = shares(values[3 + len(cut) :] - kept, zero, gap)
    share, share_bounds = shares(kept[None], values[1], gap)
    names = [str(x.wiring.writers[m]) for m in members]
    shared = dict.fromkeys(("effect", "interval", "null", "pair", "pair_interval", "excess", "excess_interval"), _SHARE)
    shared |= dict.fromkeys(("kept", "kept_interval"), _SHARE)
    return Minimality(
        effect=effect[:n],
        interval=bounds[:n],
        null=added.expand(n, -1).clone(),
        pair=effect[n:],
        pair_interval=bounds[n:],
        excess=excess,
        excess_interval=excess_bounds,
        kept=share[0],
        kept_interval=share_bounds[0],
        whole=values[0].mean(),
        empty=values[1].mean(),
        labels={"component": names, "pair": [f"{names[i]}, {names[j]}" for i, j in both], "bound": BOUNDS},
        units={**shared, **dict.fromkeys(("whole", "empty"), x.given.bound.unit)},
        reasons=one_prompt(len(x), "effect", "pair", "excess", "kept"),
        record=x.record() | {"edges": int(own.sum())},
    )


def _outside(wiring: Wiring, members: list[int], samples: int, chance: torch.Generator) -> list[int]:
    """Draw components that are not in the circuit, repeated where they are too few; none where there is none."""
    others = [u for u in range(1, len(wiring.writers)) if u not in members]
    if not others:
        return []
    order = torch.randperm(len(others), generator=chance).tolist()
    return [others[order[s % len(order)]] for s in range(samples)]


def _joined(wiring: Wiring, mask: Bool[Tensor, "writer reader"], component: int) -> Bool[Tensor, "writer reader"]:
    """Return the edges of a component from and to the components of a circuit, the embeddings and the logits."""
    rows = torch.zeros(len(wiring.writers), dtype=torch.bool)
    rows[[0, component, *inside(wiring, mask)]] = True
    columns = (belongs(wiring) & rows[:, None]).any(0)
    columns[-1] = True
    return wiring.heard & rows[:, None] & columns & touching(belongs(wiring), component)
