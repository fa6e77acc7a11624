"""Circuits of attention heads as the residual stream meets them: norms folded in, and what they hide removed.

A norm that subtracts the mean hides one direction of the stream from every reader. Readers and writers then lie in the
`dims` = d_model − 1 dimensions that are left, so that the two sides of a product are measured in the same space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Code, Refused
from cutaway.models.anatomy.norms import wide
from cutaway.models.anatomy.per_layer import Factored
from cutaway.models.anatomy.weights import Weights, logit_readers
from cutaway.models.model import Model


def readable(model: Model) -> Weights:
    """Return the weights with norms folded in, or plain ones where folding is not an identity."""
    family = model.family
    return model.weights if family.post_norm or family.ln1 is None else model.weights.folded()


def centred(model: Model) -> bool:
    """Return True if the norm before attention subtracts the mean, and it is folded in."""
    if not readable(model).is_folded:
        return False
    norms = (model.anatomy.part(i, "ln1") for i in range(model.shape.n_layers))
    return any(model.anatomy.norm(n).centred for n in norms if n is not None)


def dims(model: Model) -> int:
    """Return the number of dimensions of the stream that readers see."""
    return model.shape.d_model - int(centred(model))


def embedded(model: Model) -> Float[Tensor, "token d_model"]:
    """Return the embeddings as heads of the first layer read them."""
    return as_read(model, 0, model.weights.embed.detach())


def as_read(model: Model, layer: int, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
    """Return streams as heads of a layer read them, through the norm's centre and scale, in float32 or better."""
    x, into = wide(x), model.anatomy.part(layer, "ln1")
    if into is None or not readable(model).is_folded:
        return x
    norm = model.anatomy.norm(into)
    return norm.centre(x) / norm.scale(x)[..., None]


def ov(model: Model, heads: Sequence[Address]) -> Factored:
    """Return W_V W_O of some heads, in float32 or better [head d_model d_model].

    Raises:
        Refused: values or z are not what the weights make of what attention reads.
    """
    return _stacked(model, "ov", heads)


def qk(model: Model, heads: Sequence[Address]) -> Factored:
    """Return W_Q W_Kᵀ of some heads, in float32 or better [head d_model d_model].

    Raises:
        Refused: queries and keys are normed or scaled by position.
    """
    return _stacked(model, "qk", heads)


def heads(model: Model, chosen: Sequence[str] = ()) -> list[Address]:
    """Return the heads of these names (`4.11`, `5.*`), or all heads of the model, in order of depth.

    Raises:
        Refused: another form, no such head, or a model without attention.
    """
    named = [f"z.{name}" for name in chosen]
    found = model.places(named or ["z.*.*"])
    if any(a.site != "z" or a.unit is None or a.position is not None for a in found) or not found:
        raise Refused(f"heads {', '.join(chosen)!r}", "heads are written as layer.head", "write for example 3.1,5.*")
    return sorted(found, key=lambda a: (a.layer, a.unit))


def behind(
    model: Model, part: Literal["ln1_post", "ln2_post"], layer: int, written: Float[Tensor, "*rest d_model"]
) -> Float[Tensor, "*rest d_model"]:
    """Return what a component writes as it enters the stream: through the norm behind attention or MLP, if the family
    has one; its scale is left out.
    """
    module = None if model.family.post_norm else model.anatomy.part(layer, part)
    if module is None:
        return written
    norm = model.anatomy.norm(module)
    return norm.centre(written) * norm.weight.detach().to(written)


def readers(model: Model, layer: int, ids: Int[Tensor, "token"], dtype: torch.dtype) -> Float[Tensor, "token d_model"]:
    """Return the directions along which what heads of a layer write raises the logits of tokens, through the norm
    behind attention, if the family has one, and the final norm; their scales are left out.

    Raises:
        Refused: the stream is normed again after every layer, or logits are not linear in it.
    """
    if model.family.post_norm:
        why = "the stream is normed after every layer"
        raise Refused(f"direct effects in {model.name}", why, ("see ", Code("model.sites()")))
    rows, post = logit_readers(model.anatomy, ids, dtype).detach(), model.anatomy.part(layer, "ln1_post")
    return rows if post is None else model.anatomy.norm(post).folded(rows)


def standardised(
    rows: Float[Tensor, "row d_head"], table: Float[Tensor, "token d_head"]
) -> Float[Tensor, "row d_head"]:
    """Return rows over the standard deviation of their products with those of a table, whose mean is 0."""
    square = torch.einsum("sd,de,se->s", rows, table.T @ table / len(table), rows)
    return rows / square.clamp_min(0).sqrt().clamp_min(1e-30)[:, None]


def _stacked(model: Model, kind: str, places: Sequence[Address]) -> Factored:
    weights, parts, centre = readable(model), list[Factored](), centred(model)
    for layer in dict.fromkeys(a.layer for a in places):
        units = [a.unit for a in places if a.layer == layer]
        whole: Factored = getattr(weights, kind)(layer)
        left, right = whole.left.detach()[units], wide(whole.right.detach()[units])
        right = behind(model, "ln1_post", layer, right) if kind == "ov" and layer is not None else right
        parts.append(Factored(left, right))
    left, right = (torch.cat([wide(getattr(f, side)) for f in parts]) for side in ("left", "right"))
    if centre:
        left, right = left - left.mean(-2, keepdim=True), right - right.mean(-1, keepdim=True)
    return Factored(left, right)
