"""Rotary positions of a layer: the rotation that its queries and keys undergo, and the scale of its scores.

Families pair the dimensions in one of two ways, turn all of them or the first few, and name their frequencies
differently between layers. So each layer's queries, before and after, are compared with every rotation that the model's
frequencies could make, on one short prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models import circuits
from cutaway.models.anatomy.norms import wide
from cutaway.models.anatomy.per_layer import Factored
from cutaway.models.model import Model
from cutaway.models.projections import projection
from cutaway.models.tokens import batch

_POSITIONS = 32  # of the short prompt
_INSTEAD = "capture scores"


@dataclass(frozen=True)
class Rotary:
    """Rotation by position in one layer.

    Attributes:
        frequencies: radians per token of each pair of dimensions; empty where the layer has no positions.
        pairs: the first and the second dimension of each pair.
        gain: factor of the turned dimensions, on queries and on keys.
        scale: factor of the scores.
    """

    frequencies: Float[Tensor, "pair"]
    pairs: Int[Tensor, "two pair"]
    gain: float = 1.0
    scale: float = 1.0

    def turned(self, x: Float[Tensor, "*rest d_head"], offset: int) -> Float[Tensor, "*rest d_head"]:
        """Return queries whose products with keys at position 0 are those at a distance of `offset` tokens."""
        return self._turned(x, torch.tensor(float(offset)), self.gain**2)

    def _turned(self, x: Tensor, angle: Tensor, gain: float) -> Tensor:
        turn = angle.to(x.device, torch.float64) * self.frequencies.to(x.device, torch.float64)
        cos, sin = (gain * f(turn).to(x) for f in (torch.cos, torch.sin))
        return _turn(x, self.pairs, cos, sin)


@dataclass(frozen=True, eq=False)
class Turns:
    """Rotation of queries and keys as a layer made it in one run, to the last digit of its sines and cosines.

    Attributes:
        pairs: the first and the second dimension of each pair.
        cos: cosine of each angle, times the gain.
        sin: sine of each angle, times the gain.
    """

    pairs: Int[Tensor, "two pair"]
    cos: Float[Tensor, "position pair"]
    sin: Float[Tensor, "position pair"]

    def turned(self, x: Float[Tensor, "*rest d_head"], position: int) -> Float[Tensor, "*rest d_head"]:
        """Return vectors of one position as positions turn them."""
        return _turn(x, self.pairs, self.cos[position], self.sin[position])


def turns_of(
    model: Model, layer: int, plain: Float[Tensor, "position head d_head"], q: Float[Tensor, "position head d_head"]
) -> Turns:
    """Return the rotation that made queries `q` of `plain` ones.

    Raises:
        Refused: it is none of those that the model's frequencies could make.
    """
    first, second = pairs = _fitted(model, layer, plain, q).pairs.to(q.device)
    x, y, u, v = plain[..., first], plain[..., second], q[..., first], q[..., second]
    size = (x * x + y * y).sum(1).clamp_min(1e-300)
    return Turns(pairs, (x * u + y * v).sum(1) / size, (x * v - y * u).sum(1) / size)


def _turn(x: Float[Tensor, "*rest d_head"], pairs: Int[Tensor, "two pair"], cos: Tensor, sin: Tensor) -> Tensor:
    first, second = pairs.to(x.device)
    out = x.clone()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


@torch.no_grad()
def qk_at(model: Model, places: Sequence[Address], offset: int) -> Factored:
    """Return W_Q R W_Kᵀ of some heads, with R the rotation by the distance from query to key, in tokens.

    Raises:
        Refused: queries and keys are normed or scaled by position, or positions are not rotary.
    """
    form = circuits.qk(model, places)
    turns = turns_at(model, [a.layer or 0 for a in places], offset)
    if not turns:
        return form
    left = [turns[a.layer or 0].turned(x, offset) for a, x in zip(places, form.left, strict=True)]
    return Factored(torch.stack(left), form.right)


def check_offsets(model: Model, offsets: Sequence[int]) -> None:
    """Refuse distances from query to key that no two tokens of the model's context have."""
    if any(not 0 <= o < model.shape.context for o in offsets):
        why = f"its context has {model.shape.context} tokens"
        raise Refused(f"offsets {','.join(map(str, offsets))}", why, "write for example 1,2,4,8")


def turns_at(model: Model, layers: Sequence[int], offset: int) -> dict[int, Rotary]:
    """Return the rotations of some layers that change products at a distance: none at 0, unless they also scale.

    Raises:
        Refused: no layer has rotary positions, or one turns its queries in another way.
    """
    return rotaries(model, layers) if offset or _scales(model) else {}


def _scales(model: Model) -> bool:
    """Return True if rotary positions are configured to scale queries and keys, as in YaRN."""
    known = (v for module in model.hf.modules() for n, v in vars(module).items() if n.endswith("attention_scaling"))
    return any(v not in (None, 1) for v in known)


@torch.no_grad()
def rotaries(model: Model, layers: Sequence[int]) -> dict[int, Rotary]:
    """Return the rotations of some layers, from one forward of a short prompt.

    Raises:
        Refused: no layer has rotary positions, or one turns its queries in another way.
    """
    layers, n = sorted(set(layers)), min(_POSITIONS, model.shape.context)
    sites = ("attn_in", "q", "k", "scores")
    acts = model.capture(
        batch([[i % model.shape.d_vocab for i in range(n)]]), [f"{s}.{i}" for i in layers for s in sites]
    )
    found = dict[int, Rotary]()
    for layer in layers:
        x, q, k, scores = (wide(acts[f"{s}.{layer}"][0]) for s in sites)
        best = _fitted(model, layer, projection(model, layer, "q").of(x), q)
        found[layer] = Rotary(best.frequencies, best.pairs, best.gain, _scale(q, k, scores))
    if not any(len(r.frequencies) for r in found.values()):
        raise Refused(f"distances in {model.name}", "its positions are not rotary", _INSTEAD)
    return found


def _fitted(model: Model, layer: int, plain: Tensor, q: Float[Tensor, "position head d_head"]) -> Rotary:
    """Return the rotation that makes queries of plain ones best, of those that the model's frequencies could make."""
    apart, best = min(((_distance(r, plain, q), r) for r in _candidates(model, plain, q)), key=lambda c: c[0])
    if apart > (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.03):
        why = f"positions turn its queries in another way ({apart:.2g} of their length is left)"
        raise Refused(f"rotary positions of layer {layer} of {model.name}", why, _INSTEAD)
    return best


def _candidates(model: Model, plain: Tensor, q: Tensor) -> Iterator[Rotary]:
    """Yield no rotation, and every rotation that frequencies of the model could make."""
    yield Rotary(torch.empty(0), torch.empty(2, 0, dtype=torch.long))
    for module in model.hf.modules():
        for name, x in module.named_buffers(recurse=False):
            if name == "embed_positions" and x.ndim == 2:  # GPT-J keeps a table of sines and cosines
                x = torch.atan2(*x[1].float().chunk(2))
            elif not name.endswith("inv_freq") or x.ndim != 1:
                continue
            if 2 * len(x) > plain.shape[-1]:
                continue
            turned = 2 * len(x)
            before, after = (y[..., :turned].double().norm() for y in (plain, q))  # turns keep lengths
            gain = float(after / before.clamp_min(1e-300))
            for pairs in (torch.arange(turned).reshape(2, -1), torch.arange(turned).reshape(-1, 2).T):
                yield Rotary(x.detach().float(), pairs, 1.0 if abs(gain - 1) < 1e-3 else gain)


def _distance(rotary: Rotary, plain: Float[Tensor, "position head d_head"], q: Tensor) -> float:
    """Return how far a rotation of queries is from what the layer made of them, as a share of their length."""
    angles = torch.arange(len(plain))[:, None, None]
    return float((rotary._turned(plain, angles, rotary.gain) - q).norm() / q.norm().clamp_min(1e-30))


def _scale(q: Tensor, k: Tensor, scores: Float[Tensor, "head q_pos k_pos"]) -> float:
    """Return the factor between products of queries and keys and the scores."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    product = torch.einsum("qhd,khd->hqk", q, k).double()
    seen = torch.ones(product.shape[1:], dtype=torch.bool, device=q.device).tril().expand_as(product)
    seen = seen & scores.isfinite() & (scores > torch.finfo(scores.dtype).min / 2)
    a, b = product[seen], scores[seen].double()
    return float((a * b).sum() / a.square().sum().clamp_min(1e-300))
