"""Where along depth does what the model will say appear, each layer read by its mean effect on the last?

The Jacobian lens (Anthropic 2026): the residual stream after the embedding and after each block is put through that
depth's mean Jacobian (`ca.lenses.estimate_jacobian_lens`; definition in `cutaway.lenses.jacobian`), the final norm and
the unembedding. The logit lens is the case in which every Jacobian is the identity.

* Fields as of the tuned lens, with the logit lens on the same prompts beside it. `error` is the standard error of each
  depth's Jacobian as a share of its norm, from halves of the text; `same_position` is the share of the Jacobian that is
  the effect on the position itself, the rest being that on later positions; its interval is 95 %, over contexts.
* `each_position`: divergences are means over the positions of a prompt but the first and special tokens, to judge a
  lens on held-out text; they are else those of the last position.
* Control: the logit lens, and the mapped stream in a randomly rotated basis (`null`). A lens that was estimated on
  shuffled tokens (`cutaway lenses estimate --shuffled`) tells how much of what is read needs text.
* Assumption: effects are read to first order, and averaged over text: what a layer does to the last one on these
  prompts may be another thing. No offset is fitted, so that what all positions share is read by the Jacobian alone.
  Where effects on later positions prevail, a depth reads what will be said later, not next.
* Known failures: with a large `error` it reads noise; in early layers it can be further from the model than the logit
  lens is (the fields beside it show where).
* Equivalences (tests): at the last depth all lenses agree; in a linear network the Jacobian is the product of its maps.
* Cost: one forward, or two with `each_position`. The lens itself costs d_model backwards per context once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.lenses.jacobian import JacobianLens
from cutaway.lenses.tuned_lens import TunedCurve, fitted_fields
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class JacobianCurve(TunedCurve, kind="jacobian_curve"):
    """The answer along depth as a Jacobian lens reads it, with the logit lens and what is known of the lens beside."""

    error: Float[Tensor, "layer"]
    same_position: Float[Tensor, "layer"]
    same_position_interval: Float[Tensor, "layer bound"]


@method(
    answers="Where along depth does what the model will say appear, each layer read by its mean effect on the last?",
    paper="Anthropic 2026, Jacobian lenses",
    cost="2 * prompts * F",
    control="logit_lens",
    rung="observational",
)
def jacobian_lens(
    model: Model,
    task: Task | Prompts,
    jacobian: JacobianLens,
    /,
    *,
    answer: str | None = None,
    each_position: bool = False,
    samples: int = 8,
    seed: int = 0,
) -> JacobianCurve:
    """Read the answer's probability and rank off the residual stream, each depth through its mean Jacobian.

    Args:
        answer: of prompts without a task, the answer to follow [default: what the model itself says next].
        each_position: take divergences over all positions of each prompt, not at its last.
        samples: how many random rotations make the null.
        seed: of the rotations.

    Raises:
        Refused: the lens is of another model, or the model's residual stream shares no basis with an unembedding.
    """
    fields = fitted_fields(model, task, jacobian, answer, each_position, samples, seed)
    fields["units"] |= {"error": "share of the Jacobian's norm", "same_position": "share of the Jacobian"}
    fields["record"] |= {"estimated on": jacobian.about.get("estimation", "unknown")}
    own = {"error": 0.0, "same_position": 1.0, "same_position_interval": 1.0}  # of the last depth, the identity
    known = {n: getattr(jacobian, n).float() for n in own}
    known = {n: torch.cat([t, torch.full_like(t[:1], own[n])]) for n, t in known.items()}
    return JacobianCurve(**fields, **known)
