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
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.refuse import Code, Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.lenses.decode import AGREES, question, read_out
from cutaway.models.anatomy.norms import wide
from cutaway.models.anatomy.residual import Stream, last_stream, logit_shares
from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task

#: largest residual, of the root mean square of the totals; half precision rounds at every addition to the stream
_CLOSURE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}
_ROUNDING = 1e-6  # of the shares' sizes together: what their own sum in float32 may be off


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
    g, n, logits = generator(seed), len(asked.prompts), _logits(model, stream)
    own = logits.argmax(-1) if asked.answers is None else asked.answers
    pairs = torch.randint(model.shape.d_vocab, (2, samples, n), generator=g).to(own.device)
    answers = torch.cat([own[None], pairs[0]])
    foils = None if asked.foils is None else torch.cat([asked.foils[None], pairs[1]])
    names, shares, offset = logit_shares(model, stream, answers, foils)
    total = _toward(logits, own) if asked.foils is None else _toward(logits, own) - _toward(logits, asked.foils)
    residual = total.double() - shares[0].double().sum(-1) - offset[0].double()
    _close(model, residual, total, shares[0].abs().sum(-1) + offset[0].abs())
    names, shares = [*names, "final bias"], torch.cat([shares, offset[..., None]], dim=-1)
    if top:
        names, shares = _top(names, shares, top)
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


def _logits(model: Model, stream: Stream) -> Float[Tensor, "prompt token"]:
    """Return the model's own last logits, before its soft cap if it has one (whose inverse would lose the digits)."""
    assert stream.logits is not None
    own, cap = wide(stream.logits), unembedding(model.anatomy).cap
    if not cap:
        return own
    raw = read_out(model, stream.last, capped=False)
    missed = float((cap * torch.tanh(raw / cap) - own).abs().max())
    if missed > AGREES.get(model.dtype, 1e-3) * float(own.abs().max()):
        why = f"its logits miss those of its own last stream by {missed:.2g}"
        raise Refused(f"direct attribution on {model.name}", why, ("see ", Code("self_check(model)")))
    return raw


def _toward(logits: Float[Tensor, "prompt token"], ids: Int[Tensor, "prompt"]) -> Float[Tensor, "prompt"]:
    return logits[torch.arange(len(logits), device=logits.device), ids]


def _close(model: Model, residual: Tensor, total: Tensor, shares: Tensor) -> None:
    """Refuse shares that do not sum to the model's own logits."""
    worst, size = float(residual.abs().max()), float(total.double().pow(2).mean().sqrt())
    allowed = max(_CLOSURE.get(model.dtype, 1e-3) * size, _ROUNDING * float(shares.max()))
    if worst > allowed:
        half = torch.finfo(model.dtype).bits < 32
        raise Refused(
            f"direct attribution on {model.name}",
            f"the shares miss the logits by {worst:.2g} of {size:.2g}",
            (
                *(("use prompts whose answers differ more, or ", Keyword("dtype", "float32", of="model"), "; ") * half),
                "see ",
                Code("self_check(model)"),
                ": a site of this family may be wrong",
            ),
        )


def _top(names: list[str], shares: Float[Tensor, "pair prompt component"], top: int) -> tuple[list[str], Tensor]:
    order = shares[0].mean(0).abs().topk(min(top, len(names))).indices.tolist()
    rest = [i for i in range(len(names)) if i not in set(order)]
    if not rest:
        return [names[i] for i in order], shares[..., order]
    kept = torch.cat([shares[..., order], shares[..., rest].sum(-1, keepdim=True)], dim=-1)
    return [*(names[i] for i in order), f"{len(rest)} others"], kept
