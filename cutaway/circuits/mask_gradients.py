"""What would cutting every edge cost the answer, with the gradient by a mask over edges averaged over weaker masks?

Gradients by a mask over edges (Miller et al. 2024, arXiv:2407.08734, the AutoCircuit library), integrated. A masked
run gives each reader v the stream Σ [cur_u + (1 − m_uv)(alt_u − cur_u)] over the writers u that it hears; ones leave
the run as it is, zeros make it the run of the alternative values.

* `score` of u → v: mean over k = 1 … m of ∂metric/∂m_uv at the mask that is k/m at every edge: all edges are weakened
  together, and each counts for what it does among weakened ones. The clean run is the last of them.
* `interval`: 95 %, over prompts. `frequency`: the share of resamples of the prompts in which the edge is among the
  `share` of all edges with the largest |score|. Control (`null`): the same with alternative values as far from the
  clean ones in random directions.
* Audit: `exact` is the measured score of `audit` edges cut in the clean run, as in `circuits.eap`.
* Known failures: weakened together, edges that stand in for each other share what one alone would not lose.
* Equivalences (tests): with one step it is `circuits.eap`; finite differences of masked runs.
* Cost: m forwards and backwards for each prompt and sample of the null, 2 forwards more, and one forward an audited
  edge. Prompts run one at a time, for each has a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.circuits.alternatives import alternatives
from cutaway.circuits.eap_ig import at_least_one
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.scoring import audited
from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.record import count
from cutaway.core.stats import generator
from cutaway.interventions.ablation_values import Baseline
from cutaway.models.access.reading import observe
from cutaway.models.dry import some as some_of
from cutaway.models.edits.edge_mask import MaskedForward, places_written, removed_by, written
from cutaway.models.edits.wiring import Wiring, wiring
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task


@method(
    answers="What would cutting every edge cost the answer, with the gradient by a mask over edges averaged over weaker"
    " masks?",
    paper="Miller et al. 2024, arXiv:2407.08734",
    cost="prompts * ((8 + ((1 + samples) * steps + min(audit, cells)) * (4 if how == 'resample' else 1)) * F"
    " + (1 + samples) * steps * (4 if how == 'resample' else 1) * B)",
    control="random_direction",
    rung="interventional",
    fills=("frequency", "clean", "exact", "agreement"),
)
def mask_gradients(
    model: Model,
    task: Task,
    /,
    *,
    steps: int = 5,
    how: Baseline = "corrupt",
    audit: int = 24,
    share: float = 0.05,
    samples: int = 2,
    seed: int = 0,
) -> EdgeScores:
    """Estimate the score of every edge by the mean of gradients by its entry of a mask.

    Args:
        steps: how many masks between none and all of every edge.
        how: what stands in for a writer's value.
        audit: at how many edges the exact score is measured beside the estimate.
        share: the share of all edges whose inclusion under resampled prompts is counted.
        samples: how many random directions make the null of each edge.
        seed: of the resamples, the random directions, the donors and the audit's edges.

    Raises:
        Refused: no steps, a model without such a wiring, or alternative values that these prompts do not allow.
    """
    w, steps = wiring(model), at_least_one(steps)
    given = alternatives(model, task.bind(model), places_written(w), how, corruption=task.corruption, seed=seed)
    each, values = list[Tensor](), list[float]()
    seeds = torch.randint(1 << 62, (len(given.bound),), generator=generator(seed)).tolist()
    for i in some_of(range(len(given.bound)), 1):
        bound = given.bound.rows([i])
        own = written(model, model.capture(bound.clean, list(given.places), logits=False))
        donors = [written(model, values) for values in given.part(model, [i])]
        chance = generator(seeds[i])
        drawn = [[random_directions(own, donor, chance) for donor in donors] for _ in range(samples)]
        runs = [[_slopes(model, w, bound, donor, steps) for donor in some] for some in (donors, *drawn)]
        each.append(torch.stack([torch.stack([slope for slope, _ in run]).mean(0) for run in runs]))
        values.append(runs[0][0][1])
    each += each[-1:] * (len(given.bound) - len(each))
    values += values[-1:] * (len(given.bound) - len(values))
    scores, *null = torch.stack(each, 1)
    chance_scores = torch.stack(null, -1).mean(0)
    return audited(model, w, given, scores, chance_scores, torch.tensor(values), audit, share, seed)


def _slopes(
    model: Model, w: Wiring, bound: Bound, alternative: Mapping[Address, Tensor], steps: int
) -> tuple[Float[Tensor, "edge"], float]:
    """Return the mean gradient by the mask, and the metric of the last run, which is the clean one."""
    total, value = torch.zeros(w.heard.shape), torch.zeros(1)
    for k in some_of(range(1, steps + 1), 1):
        mask = torch.full((1, *w.heard.shape), k / steps, requires_grad=True)
        with model.edited(), torch.enable_grad(), MaskedForward(model, w, removed_by(w, mask), alternative).attached():
            value = bound.measure(observe(model.anatomy, bound.clean, bound.measure.reads), torch.arange(1))
            total += torch.autograd.grad(value.sum(), mask)[0][0]
            count(backwards=1)
    return (total / steps)[w.heard].cpu(), float(value.detach())


def random_directions(
    own: Mapping[Address, Tensor], donor: Mapping[Address, Tensor], chance: torch.Generator
) -> dict[Address, Tensor]:
    """Return values as far from one's own as the donor's, in random directions."""
    out = dict[Address, Tensor]()
    for a, x in own.items():
        noise = torch.randn(x.shape, generator=chance).to(x)
        out[a] = x + noise * ((donor[a] - x).norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    return out
