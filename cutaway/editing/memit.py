"""Do many facts hold together, spread over the MLPs of several layers?

MEMIT (Meng et al. 2023, arXiv:2210.07229): all requests are one edit. Each layer's change is
Δ = C⁻¹K (KᵀC⁻¹K + λ I)⁻¹ Rᵀ, inputs first: it weighs the requests' outputs against λ times the mean change of other
keys, of which C is the second moment (`ridge` times its mean diagonal added), over the first half of `prompts`.

* `share[measure]`, `kl` …: as those of `editing.rome`, of the one edit of all requests.
* `layers`: without any, the first third of all.
* The key of a request is its mean over the bare prompt and the contexts; the published code gives the bare prompt half
  of the weight. The value is searched as ROME's is, at the residual stream behind the last layer.
* Control (`null`): random rewrites of the same ranks and norms.
* Known failures: λ trades efficacy for drift, so one λ is one point of a curve.
* Equivalences (tests): with one request, one layer and λ = 0 the change is ROME's for the same value.
* Cost: per request, a forward and backward per context and step.
"""

from __future__ import annotations

from cutaway.core.method import method
from cutaway.editing.batch_edits import COST, KL, together
from cutaway.editing.knowledge_edit import KnowledgeEdit
from cutaway.editing.request import Requests
from cutaway.editing.solve import Ridge
from cutaway.editing.values import Search
from cutaway.models.edits.rewrite_set import Rewrites
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts


@method(
    answers="Do many facts hold together, spread over the MLPs of several layers?",
    paper="Meng et al. 2023, arXiv:2210.07229",
    cost=COST,
    control="random_rewrites",
    rung="interventional",
)
def memit(
    model: Model,
    requests: Requests,
    prompts: Prompts,
    /,
    *,
    layers: tuple[int, ...] = (),
    steps: int = 30,
    rate: float = 0.2,
    clamp: float = 4.0,
    weight: float = 10.0,
    ridge: float = 0.01,
    samples: int = 4,
    seed: int = 0,
) -> tuple[KnowledgeEdit, Rewrites]:
    """Edit all requests together, weighed against the change of other keys; `prompts` are ordinary texts.

    Args:
        layers: the layers whose MLPs are edited, ascending; none for the first third.
        steps: the most steps of the search for a value.
        rate: size of a step, in units of the root mean square of the value.
        clamp: the longest change of a value, in units of its norm.
        weight: λ, the weight of the mean change of other keys.
        ridge: added to the diagonal of the second moment, in units of its mean.
        samples: number of random rewrites.
        seed: of the contexts and random rewrites.

    Raises:
        Refused: a subject that is not in its prompt, layers that are not there, or a family whose MLPs have no output
            matrix.
    """
    search = Search(steps, rate, KL, clamp)
    return together(model, requests, prompts, layers, search, ridge, lambda c, note: Ridge(c, weight), samples, seed)
