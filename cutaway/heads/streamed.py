"""Statistics of attention by tiles: some queries on all of their keys, whose probabilities are never held at once.

A streamed softmax: each tile of scores is exponentiated against a reference of its query, and sums are scaled when the
reference grows. Every sum is over the keys that a query may look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.models.access.tiles import Tiles

#: types of keys, as `heads.types` names them, in the order of the axis `type`
NAMES = ("previous token", "current token", "first token", "duplicate token", "prefix matching")
_BY_TOKEN = 2  # the last types are found by token
_TILE = 1 << 20  # entries of a tile, over all heads
_ROWS = 256  # queries of a tile
_BLOCK = 32  # keys of which the largest is looked at first
_GROWN = 30.0  # a reference may lie this far below the largest score


def edges(length: int) -> list[int]:
    """Return the least distances of the buckets 0, 1, 2–3, 4–7, … of a sequence."""
    return [0, *(1 << i for i in range(max(length - 1, 1).bit_length()))]


def bucket_names(length: int) -> list[str]:
    """Return the distances of each bucket in words."""
    least = edges(length)
    most = [*(e - 1 for e in least[1:]), 2 * least[-1] - 1]
    return [str(a) if a == b else f"{a}–{b}" for a, b in zip(least, most, strict=True)]


@dataclass(frozen=True)
class Asked:
    """Queries of one sequence, and for the null what each of them is asked beside its own.

    Attributes:
        ids: the token ids of the sequence.
        rows: positions of the queries, ascending.
        tokens: the token of each query, and then tokens of other queries.
        keys: random keys that each query may look at.
    """

    ids: Int[Tensor, "position"]
    rows: Int[Tensor, "row"]
    tokens: Int[Tensor, "row asked"]
    keys: Int[Tensor, "row sample"]

    @staticmethod
    def draw(ids: Int[Tensor, "position"], rows: Int[Tensor, "row"], samples: int, g: torch.Generator) -> Asked:
        """Return queries with random other tokens and keys."""
        n = len(rows)
        pool = ids[torch.randint(1, len(ids), (_ROWS,), generator=g).to(ids.device)]
        other = pool[torch.randint(len(pool), (n, samples), generator=g).to(ids.device)]
        chance = torch.rand(n, samples, generator=g, dtype=torch.float64).to(ids.device)
        keys = (chance * (rows[:, None] + 1)).long()
        return Asked(ids, rows, torch.cat([ids[rows][:, None], other], 1), keys)

    def there(self) -> Bool[Tensor, "type asked row"]:
        """True where a query has keys of a type, by its own token and by each of the others."""
        at = torch.arange(len(self.ids), device=self.ids.device)
        first = torch.full((int(self.ids.max()) + 1,), len(self.ids), device=self.ids.device)
        first = first.scatter_reduce(0, self.ids, at, "amin")[self.tokens].T  # [asked, row]
        always = (self.rows > 0).expand_as(first)
        return torch.stack([always, always, always, first < self.rows, first + 1 < self.rows])


@dataclass(frozen=True)
class Looked:
    """Attention of some queries.

    Attributes:
        mass: attention to the keys of each type, by the query's own token or keys, and then by the others.
        distance: attention by bucket of distance.
        entropy: entropy of the attention, in nats.
        key: the keys of largest attention, best first.
        weight: the attention to them.
        normaliser: the logarithm of the sum of exponentiated scores.
    """

    mass: Float[Tensor, "type asked head row"]
    distance: Float[Tensor, "bucket head row"]
    entropy: Float[Tensor, "head row"]
    key: Int[Tensor, "head row rank"]
    weight: Float[Tensor, "head row rank"]
    normaliser: Float[Tensor, "head row"]

    def alone(self) -> Looked:
        """Return what is looked at by each query's own token and keys."""
        return replace(self, mass=self.mass[:, :1].clone())

    @staticmethod
    def join(parts: Sequence[Looked]) -> Looked:
        """Return queries one after the other."""
        rank = ("key", "weight")
        joined = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Looked)}
        return Looked(**{n: torch.cat(x, -2 if n in rank else -1) for n, x in joined.items()})


def look(tiles: Tiles, asked: Asked, top: int, buckets: Sequence[int]) -> Looked:
    """Return what queries look at, tile by tile over the keys up to the last of them."""
    sums = _Sums(tiles, asked, top, buckets)
    size = max(_BLOCK, _TILE // (tiles.heads * len(asked.rows)) // _BLOCK * _BLOCK)
    end = int(asked.rows.max()) + 1
    for start in range((end - 1) // size * size, -1, -size):
        sums.add(tiles(asked.rows, start, min(start + size, end)), start)
    return sums.looked()


def chunks(rows: Int[Tensor, "row"], heads: int) -> Sequence[Int[Tensor, "_"]]:
    """Return ascending queries in chunks whose tiles have a good size."""
    return rows.split(max(16, min(_ROWS, 2 * _TILE // (heads * 1024))))


class _Sums:
    """Sums over the keys seen so far, in units of e to the power of each query's reference.

    Attributes:
        base: the references; 0 before a query has seen a key.
        begun: True for queries that have seen a key.
        plain: sums of e^score and of (score − reference) e^score, single keys, and buckets of distance.
        named: sums by token over the keys that are this token, and over those that follow it.
    """

    def __init__(self, tiles: Tiles, asked: Asked, top: int, buckets: Sequence[int]):
        self.tiles, self.asked = tiles, asked
        q = asked.rows
        self.single = torch.cat([torch.stack([q - 1, q, torch.zeros_like(q)], 1), asked.keys], 1)
        least = torch.tensor(buckets, device=q.device)
        self.edge = q[:, None] - least + 1  # keys before these are in a later bucket
        tokens, self.at = asked.tokens.unique(return_inverse=True)
        column = torch.full((int(asked.ids.max()) + 1,), -1, device=q.device)
        column[tokens] = torch.arange(len(tokens), device=q.device)
        own = column[asked.ids]
        self.which = (own, torch.cat([torch.full_like(own[:1], -1), own[:-1]]))
        shape, device = (tiles.heads, len(q)), q.device
        self.base, self.begun = torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.bool, device=device)
        self.plain = torch.zeros((2 + self.single.shape[1] + len(buckets), *shape), device=device)
        self.named = torch.zeros((2, len(tokens), *shape), device=device)
        self.best = torch.full((*shape, top), -1e30, device=device)
        self.key = torch.zeros((*shape, top), dtype=torch.long, device=device)

    def add(self, scores: Float[Tensor, "head row key"], start: int) -> None:
        """Add a tile whose first key is `start`; its scores are written to."""
        if scores.dtype != self.base.dtype:
            self._become(scores.dtype)
        self._rank(scores, start)
        d = scores.sub_(self.base[..., None])
        p = d.exp()
        n = p.shape[-1]
        at = self.single - start
        inside = ((at >= 0) & (at < n)).to(p)
        found = p.gather(2, at.clamp(0, n - 1).expand(len(p), -1, -1)) * inside  # [head, row, single]
        distance = self._by_distance(p, start)
        total = distance.sum(0)
        spread = torch.einsum("hrk,hrk->hr", p, d)
        self.plain += torch.cat([total[None], spread[None], found.movedim(2, 0), distance])
        for sums, which in zip(self.named, self.which, strict=True):
            part = which[start : start + n]
            asked = (part >= 0).nonzero()[:, 0]
            if len(asked):
                sums.index_add_(0, part[asked], p[..., asked].permute(2, 0, 1).contiguous())

    def _become(self, dtype: torch.dtype) -> None:
        for name in ("base", "plain", "named", "best"):
            setattr(self, name, getattr(self, name).to(dtype))

    def _rank(self, scores: Float[Tensor, "head row key"], start: int) -> None:
        """Take the largest scores of a tile among those so far, and raise the references that they exceed."""
        n, top = scores.shape[-1], self.best.shape[-1]
        if n % _BLOCK or n // _BLOCK <= 2 * top:
            best, at = scores.topk(min(max(top, 1), n), -1)
            highest = best[..., 0]
        else:  # the largest keys are in the blocks of largest maxima
            blocks = scores.unflatten(-1, (-1, _BLOCK))
            most = blocks.amax(-1)
            highest = most.amax(-1)
            block = most.topk(max(top, 1), -1).indices
            inside = blocks.gather(2, block[..., None].expand(*block.shape, _BLOCK)).flatten(2)
            best, at = inside.topk(max(top, 1), -1)
            at = block.gather(2, at // _BLOCK) * _BLOCK + at % _BLOCK
        if top:
            self.best, chosen = torch.cat([self.best, best], -1).topk(top, -1)
            self.key = torch.cat([self.key, at + start], -1).gather(2, chosen)
        seen = highest > -1e29
        grown = seen & (~self.begun | (highest - self.base > _GROWN))
        if bool(grown.any()):
            base = torch.where(grown, highest, self.base)
            scale = torch.where(self.begun, (self.base - base).exp(), 1.0)
            self.plain[1] += (self.base - base) * self.plain[0]
            self.plain *= scale
            self.named *= scale
            self.base, self.begun = base, self.begun | seen

    def _by_distance(self, p: Float[Tensor, "head row key"], start: int) -> Float[Tensor, "bucket head row"]:
        n = p.shape[-1]
        edge = (self.edge - start).clamp(0, n)
        edge = torch.cat([edge, torch.zeros_like(edge[:, :1])], 1)  # [row, bucket + 1], descending
        if bool(((edge > 0) & (edge < n)).any()):
            before = torch.nn.functional.pad(p.cumsum(-1), (1, 0))
            upto = before.gather(2, edge.expand(len(p), -1, -1))
            return (upto[..., :-1] - upto[..., 1:]).movedim(2, 0)
        whole = (edge[:, :-1] == n) & (edge[:, 1:] == 0)  # [row, bucket]
        return p.sum(-1) * whole.T[:, None].to(p)

    def looked(self) -> Looked:
        """Return the sums as shares of all attention."""
        asked, n_single = self.asked, self.single.shape[1]
        total = self.plain[0]
        if self.tiles.formed:
            normaliser = torch.zeros_like(total)
        else:
            normaliser = self.base + total.log()
            if self.tiles.sink:
                normaliser = torch.logaddexp(normaliser, torch.zeros_like(normaliser))
        unit = (self.base - normaliser).exp()
        shares, named = self.plain * unit, self.named * unit
        away = self.plain[1] + (self.base - normaliser) * total  # Σ (score − normaliser) e^(score − reference)
        single, distance = shares[2 : 2 + n_single], shares[2 + n_single :]
        previous, current, first, others = single[0], single[1], single[2], single[3:]
        rows = torch.arange(len(asked.rows), device=asked.rows.device)
        # [asked, row, head] -> [asked, head, row]; a query never counts as its own duplicate
        same, after = (x[self.at.T, :, rows].transpose(1, 2) for x in named)
        before = asked.ids[(asked.rows - 1).clamp_min(0)]
        itself, doubled = ((asked.tokens == t[:, None]).T[:, None] for t in (asked.ids[asked.rows], before))
        mass = [torch.cat([x[None], others]) for x in (previous, current, first)]
        mass += [same - current * itself, after - current * (doubled & (asked.rows > 0))]
        return Looked(
            torch.stack(mass).clamp_min(0),
            distance,
            -(away * unit),
            self.key.masked_fill(self.best < -1e29, -1),
            (self.best - normaliser[..., None]).exp(),
            normaliser,
        )
