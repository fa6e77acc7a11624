"""Which components write the answer?

Direct logit attribution (Elhage et al. 2021; nostalgebraist 2020): the residual stream of the last position is the
exact sum of embedding, heads, attention biases and MLPs (or neurons); through the final norm with its scale frozen at
its value in this run, and the unembedding, each summand has a share of logit(answer) − logit(foil). Prompts alone have
no foil: then each has a share of logit(answer), the answer being `answer` or what the model itself says next.

* `effect[component]`: mean over prompts, in logits; positive writes the answer. `interval`: 95 %, over prompts.
* Closure: the shares plus the final biases sum to the model's own logit difference; `residual` is what is left of each
  prompt, and one above 1e-3 of the totals' size (1e-6 in float64, a tenth in bfloat16, 2 % in float16) is a refusal.
* Control: the same decomposition read toward random pairs of vocabulary tokens (`null`): what any component writes in
  any direction. Of prompts alone, toward random tokens: a part of a logit that all tokens share changes no probability,
  and the null has it too. The model's own next token was chosen for its logit, so its sum lies above the null's.
* Assumption: direct paths only. A component whose work is read by later layers can have a share near zero.
* Families that cap their logits: shares are of the uncapped logits. Cost: one forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval, one_prompt
from cutaway.lenses.closure import check_closure, difference, drawn_pairs, uncapped, with_others
from cutaway.lenses.decode import question
from cutaway.models.anatomy.residual import last_stream, logit_shares
from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class DirectAttribution(Result, kind="direct_attribution"):
    """Each component's share of the answer's logit over the foil's, or of the logit alone, without a foil."""

    effect: Float[Tensor, "component"]
    interval: Float[Tensor, "component bound"]
    null: Float[Tensor, "component sample"]
    total: Float[Tensor, "prompt"]
    residual: Float[Tensor, "prompt"]


@method(
    answers="Which components write the answer?",
    paper="Elhage et al. 2021, transformer-circuits.pub/2021/framework",
    cost="prompts * F",
    control="random_tokens",
    rung="observational",
)
def direct_attribution(
    model: Model,
    task: Task | Prompts,
    /,
    *,
    answer: str | None = None,
    neurons: bool = False,
    top: int = 0,
    samples: int = 20,
    seed: int = 0,
) -> DirectAttribution:
    """Split logit(answer) − logit(foil) into the shares of components; of prompts alone, logit(answer).

    Args:
        answer: of prompts without a task, the answer whose logit is split [default: what the model itself says next].
        neurons: split every MLP into its neurons.
        top: keep only this many largest components, the rest as one sum (0 keeps all).
        samples: how many random tokens, or pairs of them, make the null.
        seed: of the random tokens.

    Raises:
        Refused: no exact sum exists for this model, or the sum misses the logits.
    """
    asked = question(model, task, answer)
    stream = last_stream(model, asked.prompts, neurons=neurons)
    assert stream.logits is not None
    n, logits = len(asked.prompts), uncapped(model, stream.logits, stream.last)
    own = asked.known(model, logits)
    answers, foils = drawn_pairs(model, own, asked.foils, samples, seed)
    names, shares, offset = logit_shares(model, stream, answers, foils)
    total = difference(logits, own, asked.foils)
    residual = total.double() - shares[0].double().sum(-1) - offset[0].double()
    check_closure("direct attribution", model, residual, total, shares[0].abs().sum(-1) + offset[0].abs())
    names, shares = [*names, "final bias"], torch.cat([shares, offset[..., None]], dim=-1)
    if top:
        names, shares = with_others(names, shares, shares[0].mean(0).abs(), top, -1)
    return DirectAttribution(
        effect=shares[0].mean(0).cpu(),
        interval=mean_interval(shares[0]),
        null=shares[1:].mean(1).T.cpu(),
        total=total.float().cpu(),
        residual=residual.float().cpu(),
        labels={"component": names, "bound": BOUNDS},
        units={"effect": "logits", "interval": "logits", "null": "logits", "total": "logits", "residual": "logits"},
        record={
            "final norm": "scale frozen at its value in this run; centring and weight applied to every component",
            "closure": {"largest residual": float(residual.abs().max()), "mean total": float(total.mean())},
            "soft cap": "shares are of the uncapped logits" if unembedding(model.anatomy).cap else "none",
            "shares of": "logit(answer)" if foils is None else "logit(answer) − logit(foil)",
            **asked.record,
        },
        reasons=one_prompt(n, "effect"),
    )
