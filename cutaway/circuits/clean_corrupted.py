"""What would cutting every edge cost the answer, with the mean of the gradients in the clean and in the corrupt run?

Edge attribution patching at both ends (Hanna et al. 2024, arXiv:2403.17806, "clean-corrupted"): the trapezoid rule on
the way between the two runs, for one backward more than `circuits.eap`.

* `score` of u → v: Σ (clean − alternative value of u) · (∂metric/∂x_v in the clean run + that in the corrupt run) / 2.
* `interval`: 95 %, over prompts. `frequency`: the share of resamples of the prompts in which the edge is among the
  `share` of all edges with the largest |score|. Control (`null`): scores of steps of each writer's length in random
  directions, drawn from their distribution (normal, with the variance that such steps have).
* Audit: `exact` is the measured score of `audit` edges cut in the clean run, as in `circuits.eap`.
* Known failures: where both runs are saturated, both gradients miss what lies between (`circuits.eap_ig`).
* Equivalences (tests): the mean of `circuits.eap` for noise and for denoise.
* Cost: 3 forwards and 2 backwards, and one forward an audited edge.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutaway.circuits.edge_estimates import Backward, Gradients
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.scoring import scored
from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.interventions.ablation_values import Baseline
from cutaway.models.access.capture import Activations
from cutaway.models.access.reader_gradients import reader_gradients
from cutaway.models.edits.edge_mask import places_written
from cutaway.models.edits.wiring import wiring
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task


@method(
    answers="What would cutting every edge cost the answer, with the mean of the gradients in the clean and in the"
    " corrupt run?",
    paper="Hanna et al. 2024, arXiv:2403.17806",
    cost="prompts * ((8 + min(audit, cells) * (4 if how == 'resample' else 1)) * F + 2 * B)",
    control="random_direction",
    rung="interventional",
    fills=("frequency", "clean", "exact", "agreement"),
)
def clean_corrupted(
    model: Model,
    task: Task,
    /,
    *,
    how: Baseline = "corrupt",
    audit: int = 24,
    share: float = 0.05,
    samples: int = 4,
    seed: int = 0,
) -> EdgeScores:
    """Estimate the score of every edge by the mean of two gradients at its reader.

    Args:
        how: what stands in for a writer's value.
        audit: at how many edges the exact score is measured beside the estimate.
        share: the share of all edges whose inclusion under resampled prompts is counted.
        samples: how many random steps make the null of each edge.
        seed: of the resamples, the random steps, the donors and the audit's edges.

    Raises:
        Refused: a model without such a wiring, or alternative values that these prompts do not allow.
    """
    w = wiring(model)
    gradients = both_gradients(model, places_written(w))
    return scored(model, task, w, gradients, how, "noise", audit, share, samples, seed, copies=2)


def both_gradients(model: Model, places: Sequence[Address]) -> Gradients:
    """Return a function that takes the gradients at all readers in the clean and in the corrupt run."""

    def gradients(some: Bound, stand: Activations) -> Backward:
        with model.edited():
            sides = (some.clean, places), (some.corrupt, ())
            return Backward.of(places, [reader_gradients(model.anatomy, t, some.measure, kept) for t, kept in sides])

    return gradients
