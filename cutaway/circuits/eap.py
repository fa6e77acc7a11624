"""What would cutting every edge cost the answer, estimated to first order from one backward pass?

Edge attribution patching (Syed et al. 2023, arXiv:2310.10348). Two forwards and one backward for all edges between the
embeddings, heads, MLPs and the logits, where measuring them takes one forward an edge (`circuits.exact`).

* `score` of u → v: Σ (clean − alternative value of u) · ∂metric/∂x_v over positions, x_v the stream as v reads it,
  before its norm; the gradient is that of the run whose edges are cut. Queries are read by each head, keys and values
  by each key-value head.
* `direction`: noise takes the gradient in the clean run, as the paper, denoise in the corrupt run, whose edges then
  get clean values. `how` says what stands in; all but corrupt values exist for noise only.
* `interval`: 95 %, over prompts. `frequency`: the share of resamples of the prompts in which the edge is among the
  `share` of all edges with the largest |score|. Control (`null`): scores of steps of each writer's length in random
  directions, drawn from their distribution (normal, with the variance that such steps have).
* Audit: `exact` is the measured score of `audit` edges (NaN elsewhere), half of them the largest by |score|, half
  drawn from strata of the rest. `agreement` says what all edges would give.
* Known failures: a gradient misses saturated attention and effects that cancel to first order; `circuits.eap_ig` mends
  some of it. Read `agreement` before the scores.
* Equivalences (tests): gradients by hand times changes, edge by edge; the gradient by a mask over edges;
  `circuits.eap_ig` with one step, for denoise; `circuits.exact` in a model without norms and activation functions
  whose patterns are constant.
* Cost: 2 forwards and 1 backward, and one forward an audited edge. Prompts go in parts of a bounded size; no number
  depends on the parts.
"""

from __future__ import annotations

from cutaway.circuits.edge_estimates import Backward
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.scoring import scored
from cutaway.core.method import method
from cutaway.interventions.ablation_values import Baseline
from cutaway.interventions.paired_runs import Direction
from cutaway.models.access.capture import Activations
from cutaway.models.access.reader_gradients import reader_gradients
from cutaway.models.edits.edge_mask import places_written
from cutaway.models.edits.wiring import wiring
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task


@method(
    answers="What would cutting every edge cost the answer, estimated to first order from one backward pass?",
    paper="Syed et al. 2023, arXiv:2310.10348",
    cost="prompts * ((7 + min(audit, cells) * (4 if how == 'resample' else 1)) * F + B)",
    control="random_direction",
    rung="interventional",
    fills=("frequency", "clean", "corrupt", "exact", "agreement"),
)
def eap(
    model: Model,
    task: Task,
    /,
    *,
    how: Baseline = "corrupt",
    direction: Direction = "noise",
    audit: int = 24,
    share: float = 0.05,
    samples: int = 4,
    seed: int = 0,
) -> EdgeScores:
    """Estimate the score of every edge by the gradient at its reader.

    Args:
        how: what stands in for a writer's value.
        direction: noise cuts edges of the clean run, denoise gives edges of the corrupt run their clean values.
        audit: at how many edges the exact score is measured beside the estimate.
        share: the share of all edges whose inclusion under resampled prompts is counted.
        samples: how many random steps make the null of each edge.
        seed: of the resamples, the random steps, the donors and the audit's edges.

    Raises:
        Refused: a model without such a wiring, or alternative values that these prompts do not allow.
    """
    w = wiring(model)
    places = places_written(w)

    def gradients(some: Bound, stand: Activations) -> Backward:
        target = some.corrupt if direction == "denoise" else some.clean
        with model.edited():
            return Backward.of(places, [reader_gradients(model.anatomy, target, some.measure, places)])

    return scored(model, task, w, gradients, how, direction, audit, share, samples, seed)
