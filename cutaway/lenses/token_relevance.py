"""Which tokens of the prompt is the answer computed from?

AttnLRP (Achtibat et al. 2024, arXiv:2402.05602): layer-wise relevance propagation from logit(answer) − logit(foil) back
to what enters the first block. A token's relevance is its vector there times the coefficients handed back: norms with
their divisor held constant, f(x) / x for activation functions, half for each factor of a gate's product and of
attention's two products, the softmax's own gradient. Prompts alone have no foil: then it starts from logit(answer).

* `relevance[prompt, position]`: of each token, in logits; positions count from the end where prompts differ in length.
* `total[prompt]`: what is explained; `residual[prompt]`: what the relevances miss of it. Biases and the softmax take
  relevance in, so it is not zero; above the size of `total`, it is no decomposition of it.
* Deletion: tokens are removed in order of relevance, the most relevant first, and the answer's logits measured again.
  `area[order]` is their mean over the curve, over prompts (lower: the order finds what counts), `interval` 95 %, over
  prompts, for AttnLRP and for gradient × input (the same without the rules). Control (`null`): random orders, drawn for
  each prompt. `gain[order]`: how far it lies below the mean of those, with `gain_interval`; `ahead`: how far AttnLRP
  lies below gradient × input, with `ahead_interval`, all paired by prompt. `curve[series, step]`: the curves.
* `remove`: a removed token's vector in front of the first block, its position included, becomes zero, or the mean over
  the prompts' tokens. Such prompts are like none that the model has seen: a fall may also come from that, which random
  orders share.
* Assumption: the rules are heuristics. Known failures: models without learned biases but with a first token that all
  attend to give that token much relevance (the record has its share). Mixtures of experts, and models whose stream
  itself is normed, have no rules and are refused.
* Equivalence (test): it is gradient × input of the same computation, written out with what the rules hold constant.
* Cost: 4 forwards and 2 backwards, and (2 + samples) · (steps + 1) forwards.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.out_of_memory import in_halves
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.lenses.closure import difference
from cutaway.lenses.decode import question
from cutaway.lenses.places import names_of
from cutaway.models.access.backward import Attention, gradients
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task

Removed = Literal["zero", "mean"]
ORDERS = ["relevance", "gradient × input"]
_ENTRY = Address("resid_pre", 0)
_TOKENS = 1 << 12  # of one backward pass


@dataclass(frozen=True, kw_only=True)
class TokenRelevance(Result, kind="token_relevance"):
    """Relevance of tokens, and what is left of the answer when they are removed in its order.

    Attributes:
        area: mean over the deletion curve, of each order.
        interval: of `area`, 95 %, over prompts.
        null: `area` of random orders.
        gain: how far `area` lies below the mean of random orders.
        ahead: how far relevance lies below gradient × input.
        curve: what is left after each step, of both orders and of random ones.
        relevance: of each token; NaN in front of shorter prompts.
        total: what is explained.
        residual: what the relevances miss of it.
    """

    area: Float[Tensor, "order"]
    interval: Float[Tensor, "order bound"]
    null: Float[Tensor, "order sample"]
    gain: Float[Tensor, "order"]
    gain_interval: Float[Tensor, "order bound"]
    ahead: Float[Tensor, ""]
    ahead_interval: Float[Tensor, "bound"]
    curve: Float[Tensor, "series step"]
    curve_interval: Float[Tensor, "series step bound"]
    relevance: Float[Tensor, "prompt position"]
    total: Float[Tensor, "prompt"]
    residual: Float[Tensor, "prompt"]


@method(
    answers="Which tokens of the prompt is the answer computed from?",
    paper="Achtibat et al. 2024, arXiv:2402.05602",
    cost="prompts * ((4 + (2 + samples) * (steps + 1)) * F + 2 * B)",
    control="random_orders",
    rung="interventional",
)
def token_relevance(
    model: Model,
    task: Task | Prompts,
    /,
    *,
    answer: str | None = None,
    remove: Removed = "zero",
    steps: int = 10,
    samples: int = 8,
    seed: int = 0,
) -> TokenRelevance:
    """Propagate relevance from the answer's logit back to the tokens, and delete them in its order.

    Args:
        answer: of prompts without a task, the answer that is explained [default: what the model itself says next].
        remove: what a removed token's vector becomes: zero, or the mean over the prompts' tokens.
        steps: into how many equal parts of the prompt a deletion goes; the last, where all are gone, is left out.
        samples: how many random orders make the null.
        seed: of the random orders.

    Raises:
        Refused: fewer than two steps, or a model without a rule for one of its parts.
    """
    if steps < 2:
        raise Refused(Keyword("steps", steps), "a curve has a point between all tokens and none", "use 2 or more")
    asked = question(model, task, answer)
    tokens, own = asked.prompts, asked.answers
    if own is None:
        own = model.run_last(tokens).argmax(-1)
    values, vectors, (lrp, plain) = _propagated(model, tokens, own, asked.foils)
    chance = [_random(tokens, seed * samples + s) for s in range(samples)]
    stand = _stand_in(tokens, vectors, remove)
    each = _deleted(model, tokens, (own, asked.foils), vectors, stand, [lrp, plain, *chance], steps)
    areas, chances = each.mean(1), each[2:].mean(0)  # [order prompt], [step prompt]
    gains = chances.mean(0) - areas[:2]
    ahead = areas[1] - areas[0]
    curves = torch.stack([each[0], each[1], chances])
    summed = lrp.masked_fill(~tokens.mask.cpu(), 0).sum(1)
    aligned, names = _from_the_end(model, task, tokens, lrp)
    return TokenRelevance(
        area=areas[:2].mean(1),
        interval=mean_interval(areas[:2].T),
        null=areas[2:].mean(1).expand(2, -1).clone(),
        gain=gains.mean(1),
        gain_interval=mean_interval(gains.T),
        ahead=ahead.mean(),
        ahead_interval=mean_interval(ahead),
        curve=curves.mean(-1),
        curve_interval=mean_interval(curves.movedim(-1, 0)),
        relevance=aligned,
        total=values,
        residual=values - summed,
        labels=_labels(steps) | {"position": names},
        units=dict.fromkeys(("area", "gain", "ahead", "curve", "relevance", "total", "residual"), "logits"),
        record={
            "explained": "logit(answer)" if asked.foils is None else "logit(answer) − logit(foil)",
            "conservation": {
                "mean total": float(values.mean()),
                "mean relevance": float(summed.mean()),
                "largest residual": float((values - summed).abs().max()),
            },
            "share of the first token": float(_first_share(tokens, lrp).mean()),
            **asked.record,
        },
        reasons=one_prompt(len(tokens), "area", "gain", "ahead", "curve")
        | {"relevance": "one number a token: the deletion curve has the control and intervals"},
    )


def _labels(steps: int) -> dict[str, list[str]]:
    removed = [f"{100 * i / steps:.3g} %" for i in range(steps)]
    return {"order": ORDERS, "series": [*ORDERS, "random"], "step": removed, "bound": BOUNDS}


def _propagated(
    model: Model, tokens: Tokens, answers: Int[Tensor, "prompt"], foils: Int[Tensor, "prompt"] | None
) -> tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt token d_model"], list[Float[Tensor, "prompt token"]]]:
    """Return what is explained, the vectors that enter the first block, and each token's relevance by the rules and
    by gradients alone.
    """
    values, vectors, found = list[Tensor](), list[Tensor](), ([], [])
    kinds: tuple[Attention | None, ...] = ("half", None)

    def work(rows: Sequence[int]) -> None:
        some, foil = tokens.rows(rows), None if foils is None else foils[rows]

        def metric(logits: Float[Tensor, "batch token"]) -> Float[Tensor, "batch"]:
            return difference(logits.float(), answers[rows], foil)

        for kind, parts in zip(kinds, found, strict=True):
            with model.edited():
                value, (slope,), own = gradients(model.anatomy, some, [_ENTRY], metric, relevance=kind)
            product = slope[_ENTRY].float() * own[_ENTRY].float()
            parts.append(product.sum(-1).masked_fill(~some.mask, 0.0).cpu())
        values.append(value.float().cpu())
        vectors.append(own[_ENTRY])

    in_halves(range(len(tokens)), max(1, _TOKENS // tokens.ids.shape[1]), work)
    return torch.cat(values), torch.cat(vectors), [torch.cat(parts) for parts in found]


def _stand_in(tokens: Tokens, vectors: Float[Tensor, "prompt token d_model"], remove: Removed) -> Tensor:
    """Return the vector of a removed token."""
    if remove == "zero":
        return torch.zeros_like(vectors[0, 0])
    return vectors[tokens.mask.to(vectors.device)].float().mean(0).to(vectors.dtype)


def _random(tokens: Tokens, seed: int) -> Float[Tensor, "prompt token"]:
    """Return a random order of each prompt's tokens, which depends on the prompt and the seed alone."""
    out = torch.zeros(tokens.ids.shape)
    for i, (ids, mask) in enumerate(zip(tokens.ids.cpu(), tokens.mask.cpu(), strict=True)):
        own = zlib.crc32(" ".join(map(str, [seed, *ids[mask].tolist()])).encode())
        out[i, mask] = torch.rand(int(mask.sum()), generator=generator(own))
    return out


def _deleted(
    model: Model,
    tokens: Tokens,
    pair: tuple[Int[Tensor, "prompt"], Int[Tensor, "prompt"] | None],
    vectors: Float[Tensor, "prompt token d_model"],
    stand: Float[Tensor, "d_model"],
    orders: Sequence[Float[Tensor, "prompt token"]],
    steps: int,
) -> Float[Tensor, "order step prompt"]:
    """Return the logits that are left along the deletion of tokens, the largest of each order first."""

    def metric(logits: Float[Tensor, "row token"], prompt: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        return difference(logits.float(), pair[0][prompt], None if pair[1] is None else pair[1][prompt])

    mask, out = tokens.mask.cpu(), list[Tensor]()
    shares = torch.arange(steps)[:, None] * tokens.lengths.cpu()
    counts = (shares + steps - 1) // steps  # [step prompt]
    for order in orders:
        rank = order.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        gone = [(rank < n[:, None]) & mask for n in counts]
        edits = [Replace(_ENTRY, torch.where(g.to(vectors.device)[..., None], stand, vectors)) for g in gone]
        out.append(sweep(model, tokens, [[e] for e in edits], metric).float().cpu())
    return torch.stack(out)


def _from_the_end(
    model: Model, about: Task | Prompts, tokens: Tokens, x: Float[Tensor, "prompt token"]
) -> tuple[Float[Tensor, "prompt position"], list[str]]:
    """Return numbers of tokens aligned at the end of prompts, NaN in front of shorter ones; and the positions."""
    longest = int(tokens.lengths.max())
    out = torch.full((len(tokens), longest), torch.nan)
    for i, mask in enumerate(tokens.mask.cpu()):
        out[i, longest - int(mask.sum()) :] = x[i, mask]
    if not tokens.uneven:
        return out, names_of(model, about, tokens)
    return out, [f"@{p}" for p in range(-longest, 0)]


def _first_share(tokens: Tokens, x: Float[Tensor, "prompt token"]) -> Float[Tensor, "prompt"]:
    """Return the first token's part of the absolute relevance of each prompt."""
    first = x.gather(1, tokens.column(0).cpu()[:, None])[:, 0].abs()
    return first / x.abs().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
