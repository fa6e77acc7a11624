"""What would patching every place change, estimated to first order from one backward pass?

Attribution patching (Nanda 2023, "Attribution Patching"; Syed et al. 2023, arXiv:2310.10348). Two forwards and one
backward for all places of all sites asked for, where activation patching needs one forward a place.

* `effect` = Σ ∂metric/∂activation · (donor − own), the gradient taken in the run that is patched: the first-order term
  of what `patching.activation` measures, with its sign, unit and axes. A stream site gives [layer, position], a head
  site [layer, head] (all positions at once); `by` cuts it by position or by both [layer, head, position]. Patterns
  that name units or positions themselves, and several patterns, give a list of [node].
* `interval`: 95 %, over prompts. Control (`null`): the same slope along a random step of the donor's length.
* Audit: `exact` is the measured effect at `audit` places (NaN elsewhere), with its interval over prompts: half of them
  those of largest |estimate|, half drawn at random from strata of the ranks of the rest. Places whose value is the
  same in both runs have no effect and are not drawn, unless none moves; the record says how many. `agreement` says
  what all places that can be drawn would give, each place drawn counting for as many as it was drawn from: Pearson and
  Spearman correlation, the share of sign errors, and the slope of exact effects over estimates (2: the estimates are
  half as large). Its interval holds that of all these places; the record says how many of how many were measured. With
  `exact_null`, these places receive random steps as well: the null of `exact`.
* Known failures: saturated attention hides queries and keys (`patching.attribution_star` repairs it); effects that
  cancel to first order; large steps, above all whole residual streams, through norms and activation functions
  (`patching.relevance`). A gradient is no intervention: read the audit before the numbers.
* Equivalences (tests): in a model that is linear from the place on, it equals `patching.activation`; for small steps
  it does everywhere. `patching.activation(…).compare(patching.attribution(…))` holds the two against each other.
* Cost: 2 forwards and 1 backward, and one forward an audited place and step. Prompts go in parts of a bounded size,
  halved where memory runs out; no number depends on the parts.
"""

from __future__ import annotations

from cutaway.core.address import Pattern
from cutaway.core.method import method
from cutaway.interventions.effects import Effects
from cutaway.interventions.first_order import ESTIMATED, EstimateRule, effects, estimates
from cutaway.interventions.grid import By
from cutaway.interventions.paired_runs import Direction
from cutaway.models.model import Model
from cutaway.tasks.task import Task


@method(
    answers="What would patching every place change, estimated to first order from one backward pass?",
    paper="Syed et al. 2023, arXiv:2310.10348; Nanda 2023",
    cost="prompts * ((4 + min(audit, cells) * (1 + samples * exact_null)) * F + B)",
    control="random_direction",
    rung="interventional",
    fills=ESTIMATED,
)
def attribution(
    model: Model,
    task: Task,
    /,
    *,
    site: tuple[Pattern, ...] = ("z",),
    by: By = "auto",
    direction: Direction = "denoise",
    audit: int = 24,
    exact_null: bool = False,
    samples: int = 4,
    seed: int = 0,
) -> Effects:
    """Estimate the effect of exchanging each activation between the clean and the corrupt run.

    Args:
        site: a pattern such as z, resid_pre, z.5 or mlp_post.2.17@-1, or several.
        by: cut a site by position, by unit (head or neuron), or by both; auto takes units where there are any.
        direction: denoise patches clean values into the corrupt run, noise corrupt values into the clean run.
        audit: at how many places the exact effect is measured beside the estimate.
        exact_null: measure random steps at the audited places, too: the null of the exact effects.
        samples: how many random steps of equal length make the null of each place.
        seed: of the random steps and of the audit's places.

    Raises:
        Refused: a place that cannot be exchanged, or a corruption that does not change the metric.
    """
    found = estimates(model, task, site, by, direction, lambda _: EstimateRule(), samples, seed)
    return effects(model, found, audits=audit, seed=seed, steps=samples if exact_null else 0)
