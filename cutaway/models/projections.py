"""Queries, keys and scores of a layer as maps of what its attention reads, norms of queries and keys included.

With the divisors of these norms frozen, queries and keys are affine in what attention reads, and a score is bilinear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.models.anatomy.families import find
from cutaway.models.anatomy.norms import Norm, measure, wide
from cutaway.models.model import Model

_APART = {torch.float32: 1e-3, torch.float64: 1e-6}  # gap of scores and their form, of the largest; else 0.05


@dataclass(frozen=True, eq=False)
class Projection:
    """Queries or keys of a layer before positions turn them: W x + b, through their norm if they have one.

    Attributes:
        weight: the matrix of each head.
        bias: the bias of each head.
        norm: the norm behind them, or None.
        joint: True if one norm takes all heads together.
    """

    weight: Float[Tensor, "head d_model d_head"]
    bias: Float[Tensor, "head d_head"]
    norm: Norm | None = None
    joint: bool = False

    def of(self, x: Float[Tensor, "position d_model"]) -> Float[Tensor, "position head d_head"]:
        """Return the queries or keys of what attention reads."""
        y = torch.einsum("pm,hmd->phd", x, self.weight) + self.bias
        if self.norm is None:
            return y
        flat = y.flatten(1) if self.joint else y
        return (self.norm.linear(flat, self.norm.scale(flat)) + self.norm.bias.to(flat)).view_as(y)

    def affine(
        self, head: int, x: Float[Tensor, "d_model"]
    ) -> tuple[Float[Tensor, "d_head d_model"], Float[Tensor, "d_head"]]:
        """Return one head's map and constant, with the divisor of its norm at what it is where attention reads `x`."""
        rows = torch.cat([self.weight, self.bias[:, None]], 1)  # [head, d_model + 1, d_head]
        if self.norm is not None:
            rows = self._normed(rows, x)
        return rows[head, :-1].T, rows[head, -1]

    def _normed(self, rows: Tensor, x: Float[Tensor, "d_model"]) -> Tensor:
        assert self.norm is not None
        flat = rows.movedim(0, 1).flatten(1)[None] if self.joint else rows  # [head or 1, d_model + 1, width]
        scale = self.norm.scale(torch.einsum("m,hmd->hd", x, flat[:, :-1]) + flat[:, -1])
        out = self.norm.linear(flat, scale[:, None].expand(flat.shape[:2]))
        out[:, -1] += self.norm.bias.to(out)
        return out[0].unflatten(1, (len(rows), -1)).movedim(1, 0) if self.joint else out


def projection(model: Model, layer: int, side: Literal["q", "k"]) -> Projection:
    """Return the queries or keys of a layer, in float32 or better.

    Raises:
        Refused: their norm takes something other than one head, or all heads together.
    """
    w = model.weights
    weight, bias = (
        wide(v[layer].detach()).to(model.device) for v in ((w.q, w.q_bias) if side == "q" else (w.k, w.k_bias))
    )
    module = _norm(model, layer, side)
    if module is None:
        return Projection(weight, bias)
    sizes = [p.shape for p in module.parameters()]
    width = sizes[0].numel() if sizes else weight.shape[2]
    whole = not list(module.children()) and all(len(s) == 1 for s in sizes)
    if not whole or width not in (weight.shape[2], bias.numel()):
        why = f"the norm of its {side} has weights {', '.join(str(tuple(s)) for s in sizes)}"
        raise Refused(f"{side} of layer {layer} of {model.name}", why, "capture scores")
    return Projection(weight, bias, measure(module, width), width != weight.shape[2])


def _norm(model: Model, layer: int, side: str) -> torch.nn.Module | None:
    """Return the norm of a layer's queries or keys, whose names differ in the side alone."""
    for path in model.family.qk_norm:
        parent, _, name = path.rpartition(".")
        own = name if side == "q" else name.replace("query_", "key_").replace("q_", "k_")
        if (module := find(model.anatomy.blocks[layer], f"{parent}.{own}")) is not None:
            return module
    return None


@dataclass(frozen=True)
class Scoring:
    """Scores of a layer as a function of products of queries and keys.

    Attributes:
        scale: factor of the products.
        cap: the bound of a soft cap, if there is one.
    """

    scale: float
    cap: float | None = None

    def capped(self, scores: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return scores behind the soft cap, which is none in most families."""
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)


def scoring(
    model: Model,
    layer: int,
    q: Float[Tensor, "position head d_head"],
    k: Float[Tensor, "position kv_head d_head"],
    scores: Float[Tensor, "head q_pos k_pos"],
) -> Scoring:
    """Return how a layer makes its scores of queries and keys, from those of one prompt.

    Raises:
        Refused: they follow from more than the products, for example from distances.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    product = torch.einsum("qhd,khd->hqk", q, k).double()
    seen = visible(scores)
    x, y = product[seen].cpu(), scores[seen].double().cpu()
    allowed = _APART.get(model.dtype, 0.05) * float(y.abs().max().clamp_min(1e-30))
    found = Scoring(float((x * y).sum() / x.square().sum().clamp_min(1e-300)))
    if float((found.scale * x - y).abs().max()) > allowed:
        found = _capped(x.numpy(), y.numpy())
    if float((found.capped(found.scale * x) - y).abs().max()) > allowed:
        why = "they are no products of queries and keys, scaled or softly capped: distances may count too"
        raise Refused(f"scores of layer {layer} of {model.name}", why, "use a model without such biases")
    return found


def visible(scores: Float[Tensor, "*any"]) -> Any:
    """Return a mask of the keys that no mask hides."""
    return scores.isfinite() & (scores > torch.finfo(scores.dtype).min / 2)


def _capped(x: Any, y: Any) -> Scoring:
    """Return the scale and the soft cap that fit best."""
    from scipy.optimize import least_squares

    top = float(np.abs(y).max())
    slope = float(np.abs(y / np.where(x == 0, np.inf, x)).max())
    start = np.log([slope, 2 * top])
    tight = dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15)
    fit = least_squares(lambda p: np.exp(p[1]) * np.tanh(np.exp(p[0] - p[1]) * x) - y, start, **tight)
    scale, cap = np.exp(fit.x)
    return Scoring(float(scale), float(cap))
