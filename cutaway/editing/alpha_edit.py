"""Can facts be written only along directions that other keys do not use?

AlphaEdit (Fang et al. 2025, arXiv:2410.02355): the change of each layer is projected on a null space of the keys of
ordinary text. Δ = PK (KᵀPK + λ I)⁻¹ Rᵀ, inputs first; P projects on the last eigenvectors of the second moment C that
together hold at most the share `energy` of its trace. The published code cuts eigenvalues below 0.02, whatever their
scale. C is that of the first half of `prompts`. There are no earlier edits here (`solve.NullSpace` takes their keys).

* `share[measure]`, `kl` …: as those of `editing.rome`, of the one edit of all requests.
* `layers`: without any, the first third of all.
* The key of a request is its mean over the bare prompt and the contexts; the published code gives the bare prompt half
  of the weight. The value is searched as ROME's is, at the residual stream behind the last layer.
* Control (`null`): random rewrites of the same ranks and norms.
* Known failures: a null space of text that is too short is too large. One with fewer than a tenth of the directions is
  refused.
* Equivalences (tests): the solver solves the published system, and ordinary keys get no change.
* Cost: per request, a forward and backward per context and step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cutaway.core.method import method
from cutaway.editing.batch_edits import COST, KL, together
from cutaway.editing.knowledge_edit import KnowledgeEdit
from cutaway.editing.request import Requests
from cutaway.editing.solve import NullSpace, null_space
from cutaway.editing.values import Search
from cutaway.models.edits.rewrite_set import Rewrites
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts


@method(
    answers="Can facts be written only along directions that other keys do not use?",
    paper="Fang et al. 2025, arXiv:2410.02355",
    cost=COST,
    control="random_rewrites",
    rung="interventional",
)
def alpha_edit(
    model: Model,
    requests: Requests,
    prompts: Prompts,
    /,
    *,
    layers: tuple[int, ...] = (),
    steps: int = 30,
    rate: float = 0.2,
    clamp: float = 4.0,
    weight: float = 1.0,
    energy: float = 0.02,
    samples: int = 4,
    seed: int = 0,
) -> tuple[KnowledgeEdit, Rewrites]:
    """Edit all requests together, in the null space of other keys; `prompts` are ordinary texts.

    Args:
        layers: the layers whose MLPs are edited, ascending; none for the first third.
        steps: the most steps of the search for a value.
        rate: size of a step, in units of the root mean square of the value.
        clamp: the longest change of a value, in units of its norm.
        weight: λ, the weight of the size of the change.
        energy: share of the trace of the second moment that the null space may hold.
        samples: number of random rewrites.
        seed: of the contexts and random rewrites.

    Raises:
        Refused: a subject that is not in its prompt, layers that are not there, or a family whose MLPs have no output
            matrix.
    """
    search = Search(steps, rate, KL, clamp)

    def constrain(second: Tensor, note: dict[str, Any]) -> NullSpace:
        projection, note["dimension of the null space"] = null_space(second, energy)
        return NullSpace(projection, weight, projection[:, :0])

    return together(model, requests, prompts, layers, search, 0.0, constrain, samples, seed)
