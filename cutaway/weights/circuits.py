"""Which token attends to which, and what does it write?

The two circuits of an attention head through the vocabulary (Elhage et al. 2021, A mathematical framework for
transformer circuits). Embeddings, through the norm before attention, are held against each other by W_Q W_Kᵀ
(`attends`: source is the query, target the key), and through W_V W_O and the final norm against the unembedding
(`writes`: source is the token attended to, target the logit that it raises). Of tokens × tokens only rows of `sources`
are made, a block at a time.

* A pair's `strength` is its entry less the mean of its row, in standard deviations of the row: how far the target
  stands out for this source. `source`, `target`: the `pairs` sources whose best target is strongest, in this order.
* `written`: the token that the head raises most where it attends to a pair's target, so that a pair of `attends` reads
  on: which token attends to which, and writes what (`chains`).
* `offset`: the distance from query to key, at which rotary positions turn them (also where they turn only some
  dimensions). What a turn does to every pair alike is `weights.distances`.
* `same[circuit, head]`: mean strength of source and target being the same token: matching of tokens in `attends`,
  copying in `writes`. `interval`: 95 %, over sources.
* Control (`null`): the same with each source's target exchanged for that of another source, at random.
* `copying[head]`: Σλ / Σ|λ| over the eigenvalues of W_E W_V W_O W_U, with the values of another key-value head as its
  control (`copying_null`).
* Without `sources`, every token is one. Of fewer, the ids are evenly spaced.
* Assumption: heads read bare embeddings. Late heads of trained models read what earlier layers made of them; there
  `same` and `copying` may miss what the head does. Queries have their bias; learned positions
  are left out.
* Known failures: rare tokens, whose embeddings training hardly moved, can be the strongest pair of many heads.
* Equivalences (tests): the whole product tokens × tokens, multiplied out.
* Cost: no forward; with `offset`, or where rotary positions also scale (YaRN), one of a short prompt, which tells how
  positions turn queries. One product of every
  head's keys, and of its values, with the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval
from cutaway.models import circuits as weights
from cutaway.models.anatomy.weights import logit_readers
from cutaway.models.copying import copying
from cutaway.models.model import Model
from cutaway.models.rotary import Rotary, check_offsets, turns_at

SIDES = ("attends", "writes")
Sides = tuple[Tensor, Tensor, Tensor]  # a circuit's left factor, the bias after it, its right side for all tokens
_CELLS = 1 << 23  # of tokens × tokens at once


class Read(NamedTuple):
    """Readings of one circuit of every head: strengths of single sources with themselves, and the pairs."""

    own: Float[Tensor, "head source"]
    null: Float[Tensor, "head sample"]
    source: Int[Tensor, "head rank"]
    target: Int[Tensor, "head rank"]
    strength: Float[Tensor, "head rank"]
    onward: Int[Tensor, "head some"]
    onward_strength: Float[Tensor, "head some"]


@dataclass(frozen=True, kw_only=True)
class TokenPairs(Result, kind="token_pairs"):
    """QK and OV circuits of heads through the vocabulary.

    Attributes:
        same: the mean strength of a token with itself.
        interval: of `same`, 95 %, over sources.
        null: `same` with targets exchanged among sources.
        source: token ids of the strongest pairs, the strongest first; the labels have their texts.
        target: token ids that these sources attend to, or write.
        strength: how far the target stands out of its row, in standard deviations.
        copying: the eigenvalue score of the OV circuit.
        copying_null: `copying` with the values of another key-value head.
        written: token ids that a head writes where it attends to the targets of its pairs in `attends`.
        written_strength: how far that token stands out of its row, in standard deviations.
    """

    same: Float[Tensor, "circuit head"]
    interval: Float[Tensor, "circuit head bound"]
    null: Float[Tensor, "circuit head sample"]
    source: Int[Tensor, "circuit head rank"]
    target: Int[Tensor, "circuit head rank"]
    strength: Float[Tensor, "circuit head rank"]
    copying: Float[Tensor, "head"]
    copying_null: Float[Tensor, "head sample"]
    written: Int[Tensor, "head rank"] | None = None
    written_strength: Float[Tensor, "head rank"] | None = None

    def pairs(self, head: str, circuit: str = "attends") -> list[tuple[str, str]]:
        """Return the strongest pairs of a head, as texts of source and target.

        Raises:
            Refused: no such head or circuit, or a circuit that cannot be read.
        """
        at = self._entries("circuit", circuit)[0], self._entries("head", head)[0]
        if why := self.reasons.get(circuit):
            raise Refused(f"pairs of {circuit!r}", why, "ask for another circuit")
        sources, targets = (self.labels[name][at[0]][at[1]] for name in ("source", "target"))
        return list(zip(sources, targets, strict=True))

    def chains(self, head: str) -> list[tuple[str, str, str]]:
        """Return the strongest matches of a head, as texts of the token that attends, the one that it attends to, and
        the one that the head then writes.

        Raises:
            Refused: no such head, or a model whose queries and keys have no bilinear form.
        """
        if self.written is None:
            raise Refused(
                f"chains of head {head}", self.reasons.get("attends", "this result has none"), "read its pairs"
            )
        written = self.labels["written"][self._entries("head", head)[0]]
        return [(*pair, text) for pair, text in zip(self.pairs(head), written, strict=True)]


@method(
    answers="Which token attends to which, and what does it write?",
    paper="Elhage et al. 2021, A mathematical framework for transformer circuits",
    cost="offset * F",
    control="exchanged_targets",
    rung="observational",
)
@torch.no_grad()
def circuits(
    model: Model,
    /,
    *,
    heads: tuple[str, ...] = (),
    sources: int = 256,
    pairs: int = 8,
    offset: int = 0,
    samples: int = 8,
    seed: int = 0,
) -> TokenPairs:
    """Read what heads match and write off their weights.

    Args:
        heads: these, as `layer.head` or `layer.*` [default: all].
        sources: how many tokens are queries, or are attended to; 0 takes all.
        pairs: how many of the strongest pairs are kept.
        offset: the distance from query to key, in tokens; by default rotary positions stand at distance zero.
        samples: how many exchanges make the null.
        seed: of the exchanges.

    Raises:
        Refused: an encoder, no such head or offset, an unembedding that is not linear, or values that are not linear in
            what the head reads.
    """
    if not model.family.causal:
        raise Refused(f"token circuits of {model.name}", "it is an encoder", "ask a causal model")
    check_offsets(model, [offset])
    places, tables = weights.heads(model, heads), _Tables.of(model)
    count = min(sources or tables.tokens, tables.tokens)
    ids = torch.linspace(0, tables.tokens - 1, max(count, 2)).long().unique()
    g = generator(seed)
    turned = torch.stack(
        [
            (torch.arange(len(ids)) + int(s)) % len(ids)
            for s in torch.randint(1, max(len(ids), 2), (samples,), generator=g)
        ]
    )
    reasons = dict[str, str]()
    try:
        attends = tables.read(tables.attending(model, places, offset), ids, turned, pairs)
    except Refused as refusal:
        reasons["attends"], attends = refusal.why, None
    onward = None if attends is None else attends.target
    writes = tables.read(tables.writing(model, places), ids, turned, pairs, onward)
    return _result(model, places, ids, [attends, writes], reasons, samples, seed)


@dataclass(frozen=True)
class _Tables:
    """Embeddings as heads read them, and unembeddings as heads meet them [token, d_model]."""

    embed: Float[Tensor, "token d_model"]
    unembed: Float[Tensor, "token d_model"]

    @staticmethod
    def of(model: Model) -> _Tables:
        dtype = torch.promote_types(model.dtype, torch.float32)
        plain, rows = weights.embedded(model), logit_readers(model.anatomy, dtype=dtype).detach()
        tokens = min(len(plain), len(rows))
        return _Tables(plain[:tokens], rows[:tokens])

    @property
    def tokens(self) -> int:
        return len(self.embed)

    def attending(self, model: Model, places: Sequence[Address], offset: int) -> Iterator[Sides]:
        """Yield queries and keys of all tokens, of one head after the other, the keys `offset` tokens back.

        Raises:
            Refused: queries and keys are normed or scaled by position, or positions are not rotary.
        """
        group, shared = model.shape.n_heads // model.shape.n_kv_heads, dict[tuple[int, int], Tensor]()
        turns = dict[int, Rotary]()
        for layer, here in _by_layer(places):
            forms, biases = weights.qk(model, here), weights.readable(model).q_bias[layer].detach()
            turns = turns or turns_at(model, [a.layer or 0 for a in places], offset)
            for i, place in enumerate(here):
                unit, form = place.unit or 0, forms[i]
                left, bias = form.left.to(self.embed), biases[unit].to(self.embed)
                if layer in turns:
                    left, bias = turns[layer].turned(left, offset), turns[layer].turned(bias, offset)
                if (key := (layer, unit // group)) not in shared:  # heads of one group have the same keys
                    shared = {key: self.embed @ form.right.to(self.embed).T}
                yield left, bias, shared[key]

    def writing(self, model: Model, places: Sequence[Address]) -> Iterator[Sides]:
        """Yield values of a token and what the unembedding makes of them, of one head after the other."""
        for _, here in _by_layer(places):
            forms = weights.ov(model, here)
            for form in (forms[i] for i in range(len(here))):
                yield form.left.to(self.embed), torch.zeros(()), self.unembed @ form.right.to(self.embed).T

    def read(
        self, sides: Iterator[Sides], ids: Tensor, turned: Tensor, pairs: int, onward: Tensor | None = None
    ) -> Read:
        """Return own strength, exchanged strength, and the strongest pairs, of every head; and the best targets of
        further sources, if a head has any.
        """
        none = ids.new_empty(0)
        found = (self._one(*s, ids, turned, pairs, none if onward is None else onward[i]) for i, s in enumerate(sides))
        return Read(*map(torch.stack, zip(*found, strict=True)))

    def _one(
        self, left: Tensor, bias: Tensor, keys: Tensor, ids: Tensor, turned: Tensor, pairs: int, onward: Tensor
    ) -> tuple[Tensor, ...]:
        away = keys - keys.mean(0)  # [token, d_head]
        every = torch.cat([ids.to(onward.device), onward])
        rows = weights.standardised(self.embed[every] @ left + bias.to(left), away)
        mine, further = rows.split([len(ids), len(onward)])
        best = [(some @ away.T).max(-1) for some in mine.split(max(1, _CELLS // len(keys)))]
        values, targets = (torch.cat([getattr(b, name) for b in best]) for name in ("values", "indices"))
        strength, order = values.topk(min(max(pairs, 1), len(values)))
        own, drawn = (mine * away[ids]).sum(-1), torch.stack([(mine * away[ids[t]]).sum(-1).mean() for t in turned])
        last = (further @ away.T).max(-1)
        return own, drawn, ids.to(order.device)[order], targets[order], strength, last.indices, last.values


def _by_layer(places: Sequence[Address]) -> Iterator[tuple[int, list[Address]]]:
    """Yield the heads of each layer together, in the order that they have."""
    for layer, here in groupby(places, key=lambda a: a.layer or 0):
        yield layer, list(here)


def _result(
    model: Model,
    places: list[Address],
    ids: Tensor,
    found: list[Read | None],
    reasons: dict[str, str],
    samples: int,
    seed: int,
) -> TokenPairs:
    """Put both circuits together; one that the model does not have is NaN, with token 0 in its pairs."""
    *_, written, written_strength = next(r for r in reversed(found) if r is not None)
    parts = [None if r is None else r[:5] for r in found]
    there = next(r for r in parts if r is not None)
    blank = [torch.full_like(x, math.nan) if x.is_floating_point() else torch.zeros_like(x) for x in there]
    own, null, source, target, strength = (torch.stack(x).cpu() for x in zip(*(r or blank for r in parts), strict=True))
    layers = sorted({a.layer or 0 for a in places})
    at = [(layers.index(a.layer or 0), a.unit or 0) for a in places]
    scores, chance = copying(model, layers, samples, seed)
    text: dict[str, list[Any]] = {
        n: [_texts(model, side) for side in x] for n, x in (("source", source), ("target", target))
    }
    if matched := found[0] is not None:
        text["written"] = _texts(model, written)
    return TokenPairs(
        same=own.mean(-1).float(),
        interval=mean_interval(own.movedim(-1, 0)),
        null=null.float(),
        source=source,
        target=target,
        strength=strength.float(),
        copying=torch.stack([scores[p] for p in at]).cpu(),
        copying_null=torch.stack([chance[p] for p in at]).cpu(),
        written=written.cpu() if matched else None,
        written_strength=written_strength.cpu().float() if matched else None,
        labels={"circuit": [*SIDES], "head": [f"{a.layer}.{a.unit}" for a in places], "bound": BOUNDS, **text},
        units={
            **dict.fromkeys(("same", "strength", "written_strength"), "standard deviations"),
            "copying": "Σλ / Σ|λ|",
        },
        reasons={"copying": "it is of the weights alone, which have no spread over prompts"} | reasons,
        record={"sources": len(ids), "tokens": model.shape.d_vocab},
    )


def _texts(model: Model, ids: Int[Tensor, "head rank"]) -> list[list[str]]:
    return [model.text.token_texts(row) for row in ids.tolist()]
