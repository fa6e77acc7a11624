"""What would patching every place change, estimated to first order from one backward pass?

Attribution patching (Nanda 2023, "Attribution Patching"; Syed et al. 2023, arXiv:2310.10348). Two forwards and one
backward for all places of all sites asked for, where activation patching needs one forward a place.

* `effect` = Σ ∂metric/∂activation · (donor − own), the gradient taken in the run that is patched: the first-order term
  of what `patching.activation` measures, with its sign, unit and axes. A stream site gives [layer, position], a head
  site [layer, head] (all positions at once), several sites a list of [node].
* `interval`: bootstrap over prompts. Control (`null`): the same slope along a random step of the donor's length.
* Audit: `exact` is the measured effect at `audit` places, evenly over the ranks of |estimate| (NaN elsewhere);
  `agreement` is Pearson and Spearman correlation and the share of sign errors there, with bootstrap intervals.
* Known failures: saturated attention hides queries and keys (`patching.attribution_star` repairs it); effects that
  cancel to first order; large steps, above all whole residual streams, through norms and activation functions
  (`patching.relevance`). A gradient is no intervention: read the audit before the numbers.
* Equivalences (tests): in a model that is linear from the place on, it equals `patching.activation`; for small steps
  it does everywhere. `patching.activation(…).compare(patching.attribution(…))` holds the two against each other.
* Cost: 2 forwards and 1 backward, and one forward an audited place.
"""

from __future__ import annotations

from cutaway.core.method import method
from cutaway.models.model import Model
from cutaway.patching.cells import several
from cutaway.patching.effects import HeadEffects, NeuronEffects, NodeEffects, PositionEffects
from cutaway.patching.exchange import Direction
from cutaway.patching.linear import effects, slopes
from cutaway.tasks.task import Task


@method(
    answers="What would patching every place change, estimated to first order from one backward pass?",
    paper="Syed et al. 2023, arXiv:2310.10348; Nanda 2023",
    cost="prompts * ((4 + audit) * F + B)",
    control="random_direction",
)
def attribution(
    model: Model,
    task: Task,
    /,
    *,
    site: str = "z",
    direction: Direction = "denoise",
    audit: int = 24,
    samples: int = 4,
    seed: int = 0,
) -> HeadEffects | PositionEffects | NeuronEffects | NodeEffects:
    """Estimate the effect of exchanging each activation between the clean and the corrupt run.

    Args:
        site: a head or neuron site (by layer and unit), a stream site (by layer and position), or several, with commas.
        direction: denoise patches clean values into the corrupt run, noise corrupt values into the clean run.
        audit: at how many places the exact effect is measured beside the estimate.
        samples: how many random steps of equal length make the null of each place.
        seed: of the random steps and of the bootstrap.

    Raises:
        Refused: a site that is neither, or a corruption that does not change the metric.
    """
    x, parts, found = slopes(model, task, several(site), direction)
    return effects(model, x, parts, found[0], audits=audit, samples=samples, seed=seed)
