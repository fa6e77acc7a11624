"""What would cutting every edge cost the answer, with gradients averaged on the way of each writer's own value?

Edge attribution patching with integrated gradients at activations (Hanna et al. 2024, arXiv:2403.17806; Mueller et al.
2025, arXiv:2504.13151). The way of `circuits.eap_ig` is straight at the inputs; here it is straight at the writers.

* `score` of u → v: Σ (clean − alternative value of u) · mean ∂metric/∂x_v over positions, gradients taken in clean
  runs in which the writers of u's place (a layer's heads together, an MLP, the embeddings) hold alt + (k/m)(clean −
  alt), k = 0 … m − 1.
* The authors' code adds every such run to the scores of all edges and divides by the number of places; here a run
  counts for the edges of the writers that move in it, as in the definition.
* `interval`: 95 %, over prompts. `frequency`: the share of resamples of the prompts in which the edge is among the
  `share` of all edges with the largest |score|. Control (`null`): scores of steps of each writer's length in random
  directions, drawn from their distribution (normal, with the variance that such steps have).
* Audit: `exact` is the measured score of `audit` edges cut in the clean run, as in `circuits.eap`.
* Known failures: a writer's way moves all of its readers at once, which one cut edge does not.
* Equivalences (tests): with many steps the scores of all edges from an MLP add up to what patching its output does
  (`patching.activation`); without norms and activation functions `circuits.exact`.
* Cost: (2 · layers + 1) · m forwards and backwards, 2 forwards more, and one forward an audited edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cutaway.circuits.eap_ig import at_least_one
from cutaway.circuits.edge_estimates import Backward
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.scoring import scored
from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.interventions.ablation_values import Baseline
from cutaway.interventions.paired_runs import run
from cutaway.models.access.capture import Activations
from cutaway.models.access.reader_gradients import ReaderGradients, reader_gradients
from cutaway.models.dry import some as some_of
from cutaway.models.edits.edge_mask import places_written
from cutaway.models.edits.library import Add
from cutaway.models.edits.wiring import wiring
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task


@method(
    answers="What would cutting every edge cost the answer, with gradients averaged on the way of each writer's own"
    " value?",
    paper="Hanna et al. 2024, arXiv:2403.17806; Mueller et al. 2025, arXiv:2504.13151",
    cost="prompts * ((8 + steps * (1 + 2 * layers) + min(audit, cells) * (4 if how == 'resample' else 1)) * F"
    " + steps * (1 + 2 * layers) * B)",
    control="random_direction",
    rung="interventional",
    fills=("frequency", "clean", "exact", "agreement"),
)
def eap_ig_activations(
    model: Model,
    task: Task,
    /,
    *,
    steps: int = 5,
    how: Baseline = "corrupt",
    audit: int = 24,
    share: float = 0.05,
    samples: int = 4,
    seed: int = 0,
) -> EdgeScores:
    """Estimate the score of every edge by the mean of gradients on its writer's own way.

    Args:
        steps: how many runs between a writer's alternative and its clean value.
        how: what stands in for a writer's value.
        audit: at how many edges the exact score is measured beside the estimate.
        share: the share of all edges whose inclusion under resampled prompts is counted.
        samples: how many random steps make the null of each edge.
        seed: of the resamples, the random steps, the donors and the audit's edges.

    Raises:
        Refused: no steps, a model without such a wiring, or alternative values that these prompts do not allow.
    """
    w, steps = wiring(model), at_least_one(steps)
    places = places_written(w)

    def gradients(some: Bound, stand: Activations) -> Backward:
        values, own = run(model, some.clean, places, some)
        rows = some.clean.rows(list(range(len(some))) * steps)

        def slopes() -> Iterator[tuple[Sequence[Address], Sequence[ReaderGradients]]]:
            for place in some_of(places):
                far = stand[str(place)] - own[str(place)]
                way = torch.cat([(1 - k / steps) * far for k in range(steps)])
                with torch.enable_grad(), model.edited(Add(place, way)):
                    found = reader_gradients(model.anatomy, rows, some.measure, copies=steps)
                yield [place], [found]

        return Backward(values, own, slopes())

    return scored(model, task, w, gradients, how, "noise", audit, share, samples, seed, copies=steps)
