"""Attention summed over the keys of every type of head, layer by layer in one forward; no pattern is kept.

At most one layer's pattern is there at a time, and the masks of keys are made for some queries at a time, so that
memory grows with one pattern and not with the number of types or layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Code, Refused
from cutaway.core.stats import generator
from cutaway.heads.types import HeadType, Sequences, delimiters
from cutaway.models import circuits
from cutaway.models.access import taps
from cutaway.models.anatomy import rope
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.models.watching import in_batches, watched

_CELLS = 1 << 22  # most entries of one layer's patterns at once, unless one sequence has more
_MASKS = 1 << 24  # most entries of the masks at once, unless one query has more
_WORDS = 1024  # tokens of the vocabulary that a head's effect on the others is estimated from
#: takes the numbers of some sequences and what was tapped of them
Watch = Callable[[Sequence[int], Tensor], None]


@dataclass(frozen=True)
class Sums:
    """Sums of attention of every sequence; draw 0 has the keys of the types, the others keys drawn at random.

    Attributes:
        attention: attention to the keys, averaged over the queries that have any; NaN where none has.
        raises: how far the head raises the tokens at the keys, averaged over them, in standard deviations of what it
            does to the vocabulary; NaN where it cannot be read off.
        weighted: share of the keys in attention times the norm of the values.
        distance: mean distance of what is looked at, the first token left out.
        uniform: the same of a head that looks at all tokens alike.
    """

    attention: Float[Tensor, "prompt draw type layer head"]
    raises: Float[Tensor, "prompt draw type layer head"]
    weighted: Float[Tensor, "prompt type layer head"]
    distance: Float[Tensor, "prompt layer head"]
    uniform: Float[Tensor, "prompt"]


def pattern_sums(
    model: Model,
    tokens: Tokens,
    types: Sequence[HeadType],
    layers: Sequence[int],
    samples: int,
    seed: int,
    also: Mapping[Address, Watch] | None = None,
) -> tuple[Sums, dict[str, str]]:
    """Return the sums, and why `weighted` or `raises` is not read, if so.

    `also` sees activations of the same forward, batch by batch.
    """
    g, done, parts = generator(seed), list[Sequence[int]](), list[Sums]()
    width = tokens.ids.shape[1]
    readers, unread = None, dict[str, str]()
    for name, site in (("weighted", "v"), ("raises", "z")):
        try:
            _check_layers(model, site, layers)
            readers = _Readers(model) if name == "raises" and any(row.writes for row in types) else None
        except Refused as refusal:
            unread[name] = refusal.why
    if readers is None:
        unread.setdefault("raises", "no type that was asked for is about what heads write")
    for rows in in_batches(model, tokens, _CELLS // (model.shape.n_heads * width * width)):
        some = tokens.rows(rows)
        run = _Pass(model, some, _Masks(model, some, types, samples, g), layers, readers)
        with taps.attached(model.anatomy, {a: partial(_shown, watch, rows) for a, watch in (also or {}).items()}):
            parts.append(run.sums("weighted" not in unread))
        done.append(rows)
    every = (rope.in_order(done, [getattr(p, name) for p in parts]) for name in Sums.__dataclass_fields__)
    return Sums(*every), unread


def _check_layers(model: Model, site: str, layers: Sequence[int]) -> None:
    """Refuse a site that not all of the layers have."""
    if len(model.places(site)) < len(layers):
        raise Refused(
            f"{site} of {model.name}", "some of its layers have no such site", ("see ", Code("model.sites()"))
        )


def _shown(watch: Watch, rows: Sequence[int], x: Tensor) -> Tensor:
    watch(rows, x.detach())
    return x


class _Masks:
    """Keys of every type, and as many for each query drawn at random among those it may look at.

    Attributes:
        queries: number of queries with any key of each type [batch, 1, type, 1].
        keys: number of keys of each type, over all queries [batch, 1, type, 1].
    """

    def __init__(
        self, model: Model, tokens: Tokens, types: Sequence[HeadType], samples: int, g: torch.Generator
    ) -> None:
        self.tokens, self.samples, self.mark = tokens, samples, delimiters(model, tokens)
        self.rows = list({row.keys: row for row in types}.values())  # types with the same keys have the same sums
        self.place = [[row.keys for row in self.rows].index(row.keys) for row in types]
        self.width = tokens.ids.shape[1]
        whole = Sequences.of(tokens, self.mark)
        self.ranks = [self._ranked(whole, torch.rand(whole.allowed.shape, generator=g)) for _ in range(samples)]
        own = [whole.looked_at(row) for row in self.rows]
        queries, keys = (torch.stack([f(k) for k in own], 1)[:, None, :, None].float() for f in (_with_any, _number))
        self.queries, self.keys = queries, keys
        back = torch.where(whole.allowed & (whole.query > 0) & (whole.key > 0), whole.back, 0)
        self.uniform = _uniform(back, whole.allowed & (whole.query > 0) & (whole.key > 0))
        self.held: dict[int, Tensor] = {}  # by the width of the window, if all queries fit

    def blocks(self) -> list[slice]:
        """Return the columns of the queries, as many at a time as fit in memory."""
        each = len(self.tokens) * self.width * ((1 + self.samples) * len(self.rows) + 2)
        size = max(1, _MASKS // each)
        return [slice(i, min(i + size, self.width)) for i in range(0, self.width, size)]

    def of(self, reach: int, queries: slice) -> Float[Tensor, "batch mask q_pos k_pos"]:
        """Return the masks of some queries: the types', those of every draw, and last distance and presence of all
        tokens but the first.

        `reach` is the width of the layer's window, in which random keys lie.
        """
        whole = queries == slice(0, self.width)
        if whole and reach in self.held:
            return self.held[reach]
        s = Sequences.of(self.tokens, self.mark, queries)
        own = torch.stack([s.looked_at(row) for row in self.rows], 1)
        there, parts = s.allowed & (s.query > 0) & (s.key > 0), [own.float()]
        near = s.back < reach
        wanted = (own & near[:, None]).sum(-1, keepdim=True)
        for rank in self.ranks:
            some = rank[:, queries].to(own.device)
            if reach < self.width:
                some = _rank(torch.where(near & s.allowed, some, self.width))
            parts.append((some[:, None] < wanted).float())
        parts += [torch.where(there, s.back, 0)[:, None].float(), there[:, None].float()]
        made = torch.cat(parts, 1)
        if whole:
            self.held[reach] = made
        return made

    def _ranked(self, s: Sequences, chance: Tensor) -> Int[Tensor, "batch q_pos k_pos"]:
        rank = _rank(chance.masked_fill(~s.allowed.cpu(), 2.0))
        return rank.to(torch.int16 if self.width < 1 << 15 else torch.int32)


def _rank(x: Tensor) -> Tensor:
    order = x.argsort(-1)
    places = torch.arange(x.shape[-1], device=x.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _with_any(keys: Tensor) -> Tensor:
    return keys.any(-1).sum(-1)


def _number(keys: Tensor) -> Tensor:
    return keys.sum((-1, -2))


def _uniform(back: Tensor, there: Tensor) -> Float[Tensor, "batch"]:
    n = there.sum(-1)
    each = back.sum(-1) / n.clamp_min(1)  # one query's mean, which counts as often as it has tokens to look at
    return (each * (n / (n + 1))).sum(-1) / (n / (n + 1)).sum(-1)


class _Readers:
    """Directions along which the output of heads raises the logits of tokens, the final norm's scale left out.

    Raises:
        Refused: what heads write is normed again before the unembedding, or logits are not linear in it.
    """

    def __init__(self, model: Model):
        circuits.readers(model, 0, torch.zeros(1, dtype=torch.long), torch.float32)
        self.model, self.known = model, dict[int, tuple[Tensor, Tensor]]()
        model.weights.o[0]

    def of(self, ids: Int[Tensor, "token"], layer: int) -> Float[Tensor, "token head d_head"]:
        """Return the directions at a layer's z by which heads raise some tokens over the mean of the vocabulary."""
        return self._toward(ids, layer) - self._vocabulary(ids, layer)[0]

    def spread(
        self, z: Float[Tensor, "batch position head d_head"], layer: int
    ) -> Float[Tensor, "batch position head"]:
        """Return the standard deviation of what z does to the tokens of the vocabulary."""
        assert layer in self.known
        return torch.einsum("bqhd,hde,bqhe->bqh", z, self.known[layer][1], z).clamp_min(0).sqrt()

    def _vocabulary(self, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return the mean direction, and the covariance of all, from tokens of the vocabulary drawn once."""
        if layer not in self.known:
            words = torch.randperm(self.model.shape.d_vocab, generator=generator(0))[:_WORDS].to(ids.device)
            x = self._toward(words, layer)
            mean = x.mean(0)
            self.known[layer] = mean, torch.einsum("whd,whe->hde", x - mean, x - mean) / len(words)
        return self.known[layer]

    def _toward(self, ids: Tensor, layer: int) -> Tensor:
        rows = circuits.readers(self.model, layer, ids, torch.float32)
        return torch.einsum("wm,hdm->whd", rows, self.model.weights.o[layer].to(rows))


class _Pass:
    """Forward of one batch that reduces the pattern, values and outputs of each layer."""

    def __init__(
        self, model: Model, tokens: Tokens, masks: _Masks, layers: Sequence[int], readers: _Readers | None
    ) -> None:
        self.model, self.tokens, self.masks, self.layers, self.readers = model, tokens, masks, layers, readers
        self.ids, self.place = tokens.ids.unique(return_inverse=True)
        self.norms, self.reach = dict[int, Tensor](), dict[int, int]()
        self.seen, self.heavy, self.raised = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()

    @torch.no_grad()
    def sums(self, weighted: bool) -> Sums:
        """Run the forward and return the sums of its sequences; those of values too if `weighted`."""
        see = {"pattern": self._see_pattern}
        see |= {"v": self._see_values} if weighted else {}
        see |= {"z": self._see_outputs} if self.readers is not None else {}
        sees = {Address(site, i): partial(f, i) for site, f in see.items() for i in self.layers}
        watched(self.model, self.tokens, sees)
        m, types, home = self.masks, len(self.masks.rows), self.masks.queries.device
        seen, heavy, raised = (self._stacked(x, home) for x in (self.seen, self.heavy, self.raised))
        draws, rest = seen[:, :-2].unflatten(1, (-1, types)), seen[:, -2:]
        found = (
            draws / m.queries[..., None],
            raised[:, :-2].unflatten(1, (-1, types)) / m.keys[..., None],
            heavy / m.queries[:, 0, :, :, None],
        )
        order = torch.tensor(m.place, device=home)
        attention, raises, share = (x.index_select(-3, order).cpu() for x in found)
        return Sums(attention, raises, share, (rest[:, 0] / rest[:, 1]).cpu(), m.uniform.cpu())

    def _stacked(self, found: dict[int, Tensor], home: torch.device) -> Float[Tensor, "batch mask layer head"]:
        """Return one sum of all layers; NaN where it was not read."""
        like = next(iter(self.seen.values()))
        some = like[:, : len(self.masks.rows)] if found is self.heavy else like
        return torch.stack([found.get(i, torch.full_like(some, math.nan)).to(home) for i in self.layers], 2)

    def _see_values(self, layer: int, v: Tensor) -> Tensor:
        norms = v.detach().float().norm(dim=-1).transpose(1, 2)  # [batch, kv_head, position]
        self.norms[layer] = norms.repeat_interleave(self.model.shape.n_heads // norms.shape[1], 1)
        return v

    def _see_pattern(self, layer: int, pattern: Tensor) -> Tensor:
        given = pattern.detach().float()
        self.reach[layer] = reach_of(self.model, self.tokens, given)
        for queries in self.masks.blocks():
            a, mask = given[:, :, queries], self.masks.of(self.reach[layer], queries)
            _add(self.seen, layer, a, mask.to(a.device))
            if layer in self.norms:
                weight = a * self.norms[layer][:, :, None].to(a)
                own = mask[:, : len(self.masks.rows)].to(a.device)
                _add(self.heavy, layer, weight / weight.sum(-1, keepdim=True).clamp_min(1e-30), own)
        return pattern

    def _see_outputs(self, layer: int, z: Tensor) -> Tensor:
        assert self.readers is not None
        x = z.detach().float()
        toward = self.readers.of(self.ids, layer).to(x)[self.place.to(x.device)]  # [batch, position, head, d_head]
        x = x / self.readers.spread(x, layer)[..., None].clamp_min(1e-30)
        for queries in self.masks.blocks():
            effect = torch.einsum("bqhd,bkhd->bhqk", x[:, queries], toward)
            _add(self.raised, layer, effect, self.masks.of(self.reach[layer], queries).to(x.device))
        return z


def reach_of(model: Model, tokens: Tokens, pattern: Float[Tensor, "batch head q_pos k_pos"]) -> int:
    """Return the width of a layer's window: the narrowest of the configuration beyond which the last query of no
    sequence gives any attention; that of the batch if there is none.
    """
    width = tokens.ids.shape[1]
    windows = [w for w in _windows(model) if w < int(tokens.lengths.max())]
    if not windows:
        return width
    rows = torch.arange(len(pattern), device=pattern.device)
    last = pattern[rows, :, tokens.last.to(pattern.device)] > 0  # [batch, head, k_pos]
    at = tokens.position_ids.to(pattern.device)
    back = (tokens.lengths.to(at)[:, None] - 1 - at).masked_fill(~last.any(1), -1)
    return next((w for w in windows if w > int(back.max())), width)


def _windows(model: Model) -> list[int]:
    """Return the widths of windows that a configuration names, narrowest first."""
    named = model.hf.config.get_text_config().to_dict()
    return sorted({n for key, n in named.items() if "window" in key and type(n) is int and n > 0})


def _add(sums: dict[int, Tensor], layer: int, x: Tensor, masks: Tensor) -> None:
    """Add the sums of x over masked keys of some queries: [batch, mask, head]."""
    part = torch.bmm(masks.flatten(2), x.flatten(2).transpose(1, 2))
    sums[layer] = sums[layer] + part if layer in sums else part
