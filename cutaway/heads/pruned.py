"""The keys of largest attention for every query, found by upper bounds of blocks of keys: most keys are never scored.

No key of a block scores more than Σ max(q_d min_d, q_d max_d) over the least and the largest entries of its keys. Of
blocks of blocks those of the largest bounds are opened, then of their blocks, then their keys are scored. The largest
bound left unopened says what may have been missed: beyond the listed scores, nothing was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.refuse import Keyword, Refused
from cutaway.models.access.tiles import EagerTiles, Tiles

_ROWS = 64
_FAR = 0.02  # of a score, that a product may be off in half precision


@dataclass(frozen=True)
class Widths:
    """Numbers of blocks that are opened for a query.

    Attributes:
        block: keys in a block.
        many: blocks in a block of blocks.
        outer: blocks of blocks that are opened.
        inner: blocks that are opened in these.
    """

    block: int = 32
    many: int = 32
    outer: int = 8
    inner: int = 32


WIDTHS = Widths()


@dataclass(frozen=True)
class Kept:
    """The listed keys of every query but the first token.

    Attributes:
        key: best first; −1 where a query has fewer.
        score: their scores.
        least: the share of the attention to the true best keys that the listed ones hold at least.
    """

    key: Int[Tensor, "head query rank"]
    score: Float[Tensor, "head query rank"]
    least: Float[Tensor, "head query"]


def keys(layer: int, tiles: Tiles, rows: Int[Tensor, "row"], top: int, widths: Widths | None = None) -> Kept:
    """Return the listed keys of every query of a layer.

    Raises:
        Refused: scores are no scaled products of queries and keys, measured on some of `rows`.
    """
    if not isinstance(tiles, EagerTiles):
        why = "its pattern is formed, by the family itself or for an edit, and nothing is saved"
        raise Refused(f"pruned keys of layer {layer}", why, Keyword("mode", "exact"))
    q, k = (x[0] if x.dtype == torch.float64 else x[0].float() for x in (tiles.query, tiles.key))
    given = tiles.call.keywords
    scaling = given.get("scaling")
    q, cap = q * (q.shape[-1] ** -0.5 if scaling is None else scaling), given.get("softcap")
    shared, shift = len(q) // len(k), _shift(layer, tiles, rows, q, k, cap)
    found = [_head(q[h], k[h // shared], top, widths or WIDTHS, cap, tiles, shift[h]) for h in range(len(q))]
    return Kept(*(torch.stack(x) for x in zip(*found, strict=True)))


def _capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else cap * (scores / cap).tanh()


def _shift(layer: int, tiles: Tiles, rows: Tensor, q: Tensor, k: Tensor, cap: float | None) -> Float[Tensor, "head"]:
    """Return by how much each head's scores differ from products; refuse if that is not one number a head."""
    some = rows[:: max(1, len(rows) // 4)][-4:]
    end = int(some[-1]) + 1
    start = max(0, end - 1024)
    own = tiles(some, start, end)
    products = _capped(q[:, some] @ k.repeat_interleave(len(q) // len(k), 0)[:, start:end].transpose(1, 2), cap)
    seen = own > -1e29
    apart = torch.where(seen, own - products, 0.0)
    shift = apart.flatten(1).sum(-1) / seen.flatten(1).sum(-1)
    far = torch.where(seen, (apart - shift[:, None, None]).abs() - _FAR * (1 + products.abs()), 0.0)
    if bool((far > 0).any()):
        why = "its scores are no scaled products of queries and keys: a bias by position comes on top"
        raise Refused(f"pruned keys of layer {layer}", why, Keyword("mode", "sampled"))
    return shift


def _head(
    q: Float[Tensor, "position d_head"],
    k: Float[Tensor, "position d_head"],
    top: int,
    w: Widths,
    cap: float | None,
    tiles: EagerTiles,
    shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the listed keys of every query, their scores, and the share that these are proven to hold."""
    n, size = len(k), w.block * w.many
    fill = k[-1:].expand(-n % size, -1)  # a last block holds no new extremes
    inner = torch.cat([k, fill]).unflatten(0, (-1, w.block))
    low, high = inner.amin(1), inner.amax(1)  # [block, d_head]
    outer = [x.unflatten(0, (-1, w.many)) for x in (low, high)]
    far_low, far_high = outer[0].amin(1), outer[1].amax(1)
    parts = []
    for at in torch.arange(1, n, device=k.device).split(_ROWS):
        some = q[at]
        up, down = some.clamp_min(0), some.clamp_max(0)
        bound = up @ far_high.T + down @ far_low.T  # [row, outer]
        bound.masked_fill_(torch.arange(len(far_low), device=k.device) * size > at[:, None], -math.inf)
        chosen, left = _best(bound, w.outer)
        block = (chosen[:, :, None] * w.many + torch.arange(w.many, device=k.device)).flatten(1)  # [row, block]
        bound = torch.einsum("rd,rbd->rb", up, high[block]) + torch.einsum("rd,rbd->rb", down, low[block])
        bound.masked_fill_(block * w.block > at[:, None], -math.inf)
        chosen, next_left = _best(bound, w.inner)
        key = block.gather(1, chosen)[:, :, None] * w.block + torch.arange(w.block, device=k.device)
        key = key.flatten(1)  # [row, key]
        score = torch.einsum("rd,rkd->rk", some, k[key.clamp_max(n - 1)])
        score = _capped(score, cap).masked_fill(~_allowed(tiles, at, key), -math.inf)
        best, rank = score.topk(min(top, score.shape[1]), -1)
        missed = _capped(torch.maximum(left, next_left), cap)[:, None]
        possible = torch.cat([best, missed.expand_as(best)], 1).topk(best.shape[1], -1).values
        least = (best.logsumexp(-1) - possible.logsumexp(-1)).exp()
        best, rank = (
            torch.nn.functional.pad(x, (0, top - x.shape[1]), value=v) for x, v in ((best, -math.inf), (rank, 0))
        )
        parts.append((key.gather(1, rank).masked_fill(best.isinf(), -1), best + shift, least))
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))  # type: ignore[return-value]


def _best(bound: Float[Tensor, "row block"], count: int) -> tuple[Int[Tensor, "row chosen"], Float[Tensor, "row"]]:
    """Return the blocks of largest bounds, and the largest bound of those left."""
    value, at = bound.topk(min(count + 1, bound.shape[1]), -1)
    if bound.shape[1] <= count:
        return at, torch.full_like(value[:, 0], -math.inf)
    return at[:, :count], value[:, count]


def _allowed(tiles: EagerTiles, at: Int[Tensor, "row"], key: Int[Tensor, "row key"]) -> Bool[Tensor, "row key"]:
    """Return True for keys that a query may look at."""
    given, real = tiles.call.mask, key < tiles.length
    if given is None:
        return real & (key <= at[:, None])
    part = given[0, 0][at[:, None], key.clamp_max(tiles.length - 1)]
    return real & (part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2)
