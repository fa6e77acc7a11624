"""What would cutting every edge cost the answer, with the gradient averaged on the way from corrupt to clean inputs?

Edge attribution patching with integrated gradients (Hanna et al. 2024, arXiv:2403.17806). Where a gradient at one
point is flat although the metric changes further on, the mean of several sees the change.

* `score` of u → v: Σ (clean − alternative value of u) · mean ∂metric/∂x_v over positions, gradients taken in runs
  whose first stream is z′ + (k/m)(z − z′), k = 0 … m − 1, between the corrupt prompt's z′ and the clean prompt's z: as
  in the authors' code, from the corrupt run itself to one step before the clean one.
* `interval`: 95 %, over prompts. `frequency`: the share of resamples of the prompts in which the edge is among the
  `share` of all edges with the largest |score|. Control (`null`): scores of steps of each writer's length in random
  directions, drawn from their distribution (normal, with the variance that such steps have).
* Audit: `exact` is the measured score of `audit` edges cut in the clean run, as in `circuits.eap`.
* Known failures: the way is straight at the inputs only; what later layers make of it need not lie between the two
  runs. Scores vary with the prompts (read `interval` and `frequency`).
* Equivalences (tests): gradients by hand in each run times changes; with one step `circuits.eap` for denoise.
* Cost: 3 + m forwards and m backwards, and one forward an audited edge; the m runs of a prompt share a batch.
"""

from __future__ import annotations

import torch

from cutaway.circuits.edge_estimates import Backward
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.scoring import scored
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.interventions.ablation_values import Baseline
from cutaway.interventions.paired_runs import run
from cutaway.models.access.capture import Activations
from cutaway.models.access.reader_gradients import reader_gradients
from cutaway.models.edits.edge_mask import places_written
from cutaway.models.edits.library import Add
from cutaway.models.edits.wiring import wiring
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task


@method(
    answers="What would cutting every edge cost the answer, with the gradient averaged on the way from corrupt to clean"
    " inputs?",
    paper="Hanna et al. 2024, arXiv:2403.17806",
    cost="prompts * ((8 + steps + min(audit, cells) * (4 if how == 'resample' else 1)) * F + steps * B)",
    control="random_direction",
    rung="interventional",
    fills=("frequency", "clean", "exact", "agreement"),
)
def eap_ig(
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
    """Estimate the score of every edge by the mean of several gradients at its reader.

    Args:
        steps: how many runs between the corrupt and the clean inputs.
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
        first, rows = str(places[0]), some.clean.rows(list(range(len(some))) * steps)
        corrupt = stand if how == "corrupt" else model.capture(some.corrupt, first, logits=False)
        far = corrupt[first] - own[first]
        with model.edited(Add(first, torch.cat([(1 - k / steps) * far for k in range(steps)]))):
            found = reader_gradients(model.anatomy, rows, some.measure, copies=steps)
        return Backward(values, own, [(places, [found])])

    return scored(model, task, w, gradients, how, "noise", audit, share, samples, seed, copies=steps)


def at_least_one(steps: int) -> int:
    """Return the number of steps.

    Raises:
        Refused: there is none.
    """
    if steps < 1:
        raise Refused(Keyword("steps", steps), "a mean needs a run", ("use ", Keyword("steps", 1), " or more"))
    return steps
