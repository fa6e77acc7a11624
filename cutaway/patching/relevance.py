"""What would patching every place change, estimated with relevance coefficients in place of gradients?

Relevance patching (RelP: Jafari et al. 2025, arXiv:2508.21258). Attribution patching whose backward pass hands back the
coefficients of layer-wise relevance propagation, which follow the function over the whole step from zero instead of
its tangent: gradients of norms and activation functions are steep where their effect is small, and flat where it is
large.

* `effect` = Σ coefficient · (donor − own), in the axes of `patching.attribution`, `by` included. The coefficients:
  norms with their divisor held constant (LN-rule), f(x) / x for activation functions (identity rule), half for each
  factor of a gate's product (half rule). Weights and the metric keep their gradients. No activation changes by a bit.
* `attention`: `gradient` differentiates through patterns (the authors' setting for GPT-2), `constant` holds them fixed
  (AH-rule), `half` halves both of attention's products (Achtibat et al. 2024, arXiv:2402.05602).
* `interval`: 95 %, over prompts. Control (`null`): the same coefficients along a random step of the donor's length.
* Audit: `exact` is the measured effect at `audit` places (NaN elsewhere), and `agreement` says what all places would
  give, with its interval, as in `patching.attribution`.
* Known failures: the rules are heuristics, best for residual streams and MLP outputs; coefficients are those of the
  patched run alone. Mixtures of experts and models whose stream itself is normed are refused.
* Equivalences (tests): without norms and with linear activation functions it equals attribution patching; without
  biases Σ coefficient · activation over the stream is the metric itself, at every layer, under `constant`.
* Cost: 2 forwards and 1 backward, and one forward an audited place. Prompts go in parts of a bounded size, halved
  where memory runs out; no number depends on the parts.
"""

from __future__ import annotations

from cutaway.core.address import Pattern
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.interventions.effects import Effects
from cutaway.interventions.first_order import ESTIMATED, EstimateRule, Nodes, effects, estimates
from cutaway.interventions.grid import By
from cutaway.interventions.paired_runs import Direction
from cutaway.models.access.backward import Attention
from cutaway.models.model import Model
from cutaway.tasks.task import Task

_BEHIND = {"q", "k", "scores", "pattern"}  # sites that act through the pattern only


@method(
    answers="What would patching every place change, estimated with relevance coefficients in place of gradients?",
    paper="Jafari et al. 2025, arXiv:2508.21258",
    cost="prompts * ((4 + min(audit, cells) * (1 + samples * exact_null)) * F + B)",
    control="random_direction",
    rung="interventional",
    fills=ESTIMATED,
)
def relevance(
    model: Model,
    task: Task,
    /,
    *,
    site: tuple[Pattern, ...] = ("z",),
    by: By = "auto",
    direction: Direction = "denoise",
    attention: Attention = "gradient",
    audit: int = 24,
    exact_null: bool = False,
    samples: int = 4,
    seed: int = 0,
) -> Effects:
    """Estimate the effect of exchanging each activation, by relevance instead of gradients.

    Args:
        site: a pattern such as z, resid_pre, z.5 or mlp_post.2.17@-1, or several.
        by: cut a site by position, by unit (head or neuron), or by both; auto takes units where there are any.
        direction: denoise patches clean values into the corrupt run, noise corrupt values into the clean run.
        attention: the rule for attention: gradient (none), constant patterns, or half for each factor of its products.
        audit: at how many places the exact effect is measured beside the estimate.
        exact_null: measure random steps at the audited places, too: the null of the exact effects.
        samples: how many random steps of equal length make the null of each place.
        seed: of the random steps and of the audit's places.

    Raises:
        Refused: a place that cannot be exchanged, one that a constant pattern cuts off, a corruption that does not
            change the metric, or a model without a rule for one of its parts.
    """

    def rule(nodes: list[Nodes]) -> EstimateRule:
        if attention == "constant" and (behind := [n.site for n in nodes if n.site in _BEHIND]):
            raise Refused(
                f"relevance of site {behind[0]!r}",
                ("it acts through the pattern, which ", Keyword("attention", "constant"), " holds fixed"),
                ("use ", Keyword("attention", "gradient"), " or 'half'"),
            )
        return EstimateRule(relevance=attention)

    found = estimates(model, task, site, by, direction, rule, samples, seed)
    return effects(model, found, audits=audit, seed=seed, steps=samples if exact_null else 0)
