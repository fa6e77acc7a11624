"""What would cutting every edge cost the answer, estimated with relevance coefficients in place of gradients?

Relevance patching of edges (RelP: Jafari et al. 2025, arXiv:2508.21258): `circuits.eap` whose backward pass hands back
the coefficients of layer-wise relevance propagation, as `patching.relevance` does at nodes.

* `score` of u → v: Σ (clean − alternative value of u) · coefficient at x_v over positions. Norms, that of the reader
  included, have their divisor held constant, f(x) / x stands for the slope of an activation function, and each factor
  of a gate gets half. `attention`: gradient differentiates through patterns (the authors' setting for GPT-2), constant
  holds them fixed, half halves both of attention's products.
* `interval`: 95 %, over prompts. `frequency`: the share of resamples of the prompts in which the edge is among the
  `share` of all edges with the largest |score|. Control (`null`): scores of steps of each writer's length in random
  directions, drawn from their distribution (normal, with the variance that such steps have).
* Audit: `exact` is the measured score of `audit` edges cut in the clean run, as in `circuits.eap`.
* Known failures: the rules are heuristics; mixtures of experts are refused. Constant patterns give all edges into
  queries and keys the score 0.
* Equivalences (tests): without norms and activation functions `circuits.exact`.
* Cost: 2 forwards and 1 backward, and one forward an audited edge.
"""

from __future__ import annotations

from cutaway.circuits.edge_estimates import Backward
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.scoring import scored
from cutaway.core.method import method
from cutaway.interventions.ablation_values import Baseline
from cutaway.models.access.backward import Attention
from cutaway.models.access.capture import Activations
from cutaway.models.access.reader_gradients import reader_gradients
from cutaway.models.edits.edge_mask import places_written
from cutaway.models.edits.wiring import wiring
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task


@method(
    answers="What would cutting every edge cost the answer, estimated with relevance coefficients in place of"
    " gradients?",
    paper="Jafari et al. 2025, arXiv:2508.21258",
    cost="prompts * ((7 + min(audit, cells) * (4 if how == 'resample' else 1)) * F + B)",
    control="random_direction",
    rung="interventional",
    fills=("frequency", "clean", "exact", "agreement"),
)
def relp(
    model: Model,
    task: Task,
    /,
    *,
    attention: Attention = "gradient",
    how: Baseline = "corrupt",
    audit: int = 24,
    share: float = 0.05,
    samples: int = 4,
    seed: int = 0,
) -> EdgeScores:
    """Estimate the score of every edge by relevance instead of gradients.

    Args:
        attention: the rule for attention: gradient (none), constant patterns, or half for each factor of its products.
        how: what stands in for a writer's value.
        audit: at how many edges the exact score is measured beside the estimate.
        share: the share of all edges whose inclusion under resampled prompts is counted.
        samples: how many random steps make the null of each edge.
        seed: of the resamples, the random steps, the donors and the audit's edges.

    Raises:
        Refused: a model without such a wiring or without a rule for one of its parts, or alternative values that these
            prompts do not allow.
    """
    w = wiring(model)
    places = places_written(w)

    def gradients(some: Bound, stand: Activations) -> Backward:
        with model.edited():
            found = reader_gradients(model.anatomy, some.clean, some.measure, places, relevance=attention)
            return Backward.of(places, [found])

    return scored(model, task, w, gradients, how, "noise", audit, share, samples, seed)
