"""Closure of attributions: their shares sum to the model's own logits, or are refused."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Code, Keyword, Refused
from cutaway.core.stats import generator
from cutaway.lenses.decode import AGREES, read_out
from cutaway.models.anatomy.norms import wide
from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.model import Model

#: largest residual, of the root mean square of the totals; half precision rounds at every addition to the stream
_CLOSURE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}
_ROUNDING = 1e-6  # of the shares' sizes together: what their own sum in float32 may be off


def drawn_pairs(
    model: Model, own: Int[Tensor, "prompt"], foils: Int[Tensor, "prompt"] | None, samples: int, seed: int
) -> tuple[Int[Tensor, "pair prompt"], Int[Tensor, "pair prompt"] | None]:
    """Return answers and foils: in front those of the prompts, then `samples` random pairs of tokens for the null; no
    foils if the prompts have none.
    """
    pairs = torch.randint(model.shape.d_vocab, (2, samples, len(own)), generator=generator(seed)).to(own.device)
    return torch.cat([own[None], pairs[0]]), None if foils is None else torch.cat([foils[None], pairs[1]])


def with_others(
    names: list[str], shares: Float[Tensor, "*axes"], sizes: Float[Tensor, "name"], top: int, axis: int
) -> tuple[list[str], Float[Tensor, "*kept"]]:
    """Return the `top` largest shares along an axis with their names, and the sum of the others behind them."""
    order = sizes.topk(min(top, len(names))).indices.tolist()
    rest = [i for i in range(len(names)) if i not in set(order)]
    first, others = (shares.index_select(axis, torch.tensor(i, device=shares.device)) for i in (order, rest or order))
    if not rest:
        return [names[i] for i in order], first
    return [*(names[i] for i in order), f"{len(rest)} others"], torch.cat([first, others.sum(axis, keepdim=True)], axis)


def uncapped(
    model: Model, logits: Float[Tensor, "prompt token"], last: Float[Tensor, "prompt d_model"]
) -> Float[Tensor, "prompt token"]:
    """Return the model's own last logits, before its soft cap if it has one (whose inverse would lose the digits).

    Raises:
        Refused: the logits miss those of the model's own last stream.
    """
    own, cap = wide(logits), unembedding(model.anatomy).cap
    if not cap:
        return own
    raw = read_out(model, last, capped=False)
    missed = float((cap * torch.tanh(raw / cap) - own).abs().max())
    if missed > AGREES.get(model.dtype, 1e-3) * float(own.abs().max()):
        why = f"its logits miss those of its own last stream by {missed:.2g}"
        raise Refused(f"attribution of logits on {model.name}", why, ("see ", Code("self_check(model)")))
    return raw


def toward(logits: Float[Tensor, "prompt token"], ids: Int[Tensor, "prompt"]) -> Float[Tensor, "prompt"]:
    """Return the logit of one token per prompt."""
    return logits[torch.arange(len(logits), device=logits.device), ids]


def difference(
    logits: Float[Tensor, "prompt token"], answers: Int[Tensor, "prompt"], foils: Int[Tensor, "prompt"] | None
) -> Float[Tensor, "prompt"]:
    """Return the logit of the answers, minus that of the foils if there are any."""
    own = toward(logits, answers)
    return own if foils is None else own - toward(logits, foils)


def check_closure(what: str, model: Model, residual: Tensor, total: Tensor, shares: Tensor) -> None:
    """Refuse shares that do not sum to what they are shares of.

    Args:
        what: the attribution, in words.
        residual: what the shares miss, per prompt.
        total: what they are shares of.
        shares: the sum of their absolute values, per prompt.

    Raises:
        Refused: the largest residual is above what the precision of the model explains.
    """
    worst, size = float(residual.abs().max()), float(total.double().pow(2).mean().sqrt())
    allowed = max(_CLOSURE.get(model.dtype, 1e-3) * size, _ROUNDING * float(shares.max()))
    if worst > allowed:
        half = torch.finfo(model.dtype).bits < 32
        raise Refused(
            f"{what} on {model.name}",
            f"the shares miss the logits by {worst:.2g} of {size:.2g}",
            (
                *(("use prompts whose answers differ more, or ", Keyword("dtype", "float32", of="model"), "; ") * half),
                "see ",
                Code("self_check(model)"),
                ": a site of this family may be wrong",
            ),
        )
