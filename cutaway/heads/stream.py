"""What do heads look at in texts so long that no pattern fits into memory?

Attention by tiles: scores of some queries on some keys, streamed through a softmax, so that memory grows with
tokens × listed keys × heads and never with tokens². Queries and keys are the model's own, after rope, with its soft
caps, windows and sinks (Rosser et al. 2025, arXiv:2510.19875, prune instead and do not say what they miss).

* `mass[type, layer, head]`: attention to the keys of a type, averaged over the queries that have any, never the first
  token: the previous token, the token itself, the first token, the same token earlier (duplicate token), and what
  followed the same token earlier (prefix matching). They are those of `heads.types`.
* `distance[layer, head, bucket]`: attention by distance in powers of two, averaged over all queries; `uniform` is that
  of a head that looks at everything alike. `entropy`: in nats. `listed`: attention to the listed keys.
* `key` and `weight[layer, head, prompt, query, rank]`: the `top` keys of each query, best first; their positions
  are `position[prompt, query]`.
* `mode`: "exact" takes every query; "sampled" takes `rows` random ones, each exact, so means are unbiased (the default
  from 16384 tokens on); "pruned" lists the keys of every query by upper bounds of blocks of keys, which may miss some:
  `recall` is the share of the attention to the true `top` keys that the listed ones hold, measured on `rows` random
  queries that are exact, and `least_recall` what the bounds prove over all queries, both to
  the model's rounding. Its other fields are of the sample.
* `interval`: 95 %, over sequences. Of one sequence, over its random queries: how far the mean over all of its queries
  may be, and nothing about other texts.
* Control: a random key in place of the previous, current and first token, and the keys of another query's token in
  place of the own (`null`). Text repeats common words, so a head that looks at common words has duplicates in both.
* Assumption: the kernel forms no pattern: load the model with attention='sdpa'. A sliding window narrower than the
  text makes transformers itself form a mask of tokens² bits, and it is not taken out of `uniform` and the null.
* Known failures: families that compute attention inline form their patterns, and nothing is saved there. Keys without
  locality defeat blocks, and recall says so. Attention is no effect.
* Cost: one forward a sequence and the attention again: half of tokens² products a head, or `rows` × tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval
from cutaway.heads import pruned
from cutaway.heads.streamed import NAMES, Asked, Looked, bucket_names, chunks, edges, look
from cutaway.models.access import forward
from cutaway.models.access.tiles import Tiles, tiled
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.repeats import Repeats

Mode = Literal["auto", "exact", "sampled", "pruned"]
_LONG = 16384  # tokens from which on queries are drawn
_SHARES = (
    "mass",
    "interval",
    "null",
    "distance",
    "distance_interval",
    "uniform",
    "listed",
    "listed_interval",
    "weight",
)
_IN = {"attention": _SHARES, "nats": ("entropy", "entropy_interval")}
_IN["share"] = ("recall", "recall_interval", "least_recall")
_UNITS = {name: unit for unit, names in _IN.items() for name in names}


@dataclass(frozen=True, kw_only=True)
class StreamedAttention(Result, kind="streamed_attention"):
    """Attention of every head in long texts, without its pattern.

    Attributes:
        mass: the mean attention to the keys of each type.
        interval: of `mass`, 95 %.
        null: `mass` with a random key, or with the token of another query.
        distance: the mean attention by distance.
        distance_interval: of `distance`, 95 %.
        uniform: `distance` of uniform attention.
        entropy: the mean entropy of the attention.
        entropy_interval: of `entropy`, 95 %.
        listed: the mean attention to the listed keys.
        listed_interval: of `listed`, 95 %.
        recall: the share of the attention to the true best keys that is found; 1 unless keys were pruned.
        recall_interval: of `recall`, 95 %.
        least_recall: a share that `recall` over all queries is proven to reach; 1 unless keys were pruned.
        position: the position of each query; −1 where a sequence has fewer.
        key: the position of each listed key, −1 where a query has fewer.
        weight: the attention to it.
    """

    mass: Float[Tensor, "type layer head"]
    interval: Float[Tensor, "type layer head bound"]
    null: Float[Tensor, "type layer head sample"]
    distance: Float[Tensor, "layer head bucket"]
    distance_interval: Float[Tensor, "layer head bucket bound"]
    uniform: Float[Tensor, "bucket"]
    entropy: Float[Tensor, "layer head"]
    entropy_interval: Float[Tensor, "layer head bound"]
    listed: Float[Tensor, "layer head"]
    listed_interval: Float[Tensor, "layer head bound"]
    recall: Float[Tensor, "layer head"]
    recall_interval: Float[Tensor, "layer head bound"]
    least_recall: Float[Tensor, "layer head"]
    position: Int[Tensor, "prompt query"]
    key: Int[Tensor, "layer head prompt query rank"]
    weight: Float[Tensor, "layer head prompt query rank"]


@method(
    answers="What do heads look at in texts so long that no pattern fits into memory?",
    paper="Rosser et al. 2025, arXiv:2510.19875",
    cost="prompts * F",
    control="shuffled_keys",
    rung="observational",
)
def stream(
    model: Model,
    prompts: Prompts | Repeats,
    /,
    *,
    mode: Mode = "auto",
    rows: int = 512,
    top: int = 8,
    layers: tuple[int, ...] = (),
    samples: int = 8,
    seed: int = 0,
) -> StreamedAttention:
    """Return statistics of the attention of every head, streamed over tiles.

    Args:
        mode: "exact" for every query, "sampled" for random ones, "pruned" for the keys of every query by bounds;
            "auto" is exact below 16384 tokens.
        rows: how many random queries a sequence is sampled by.
        top: how many keys are listed for each query.
        layers: only these; all if empty.
        samples: how many shuffles make the null.
        seed: of the queries and the shuffles.

    Raises:
        Refused: an encoder, a model without attention in these layers, sequences of one token, no rows or keys, or
            pruned keys where scores are no products of queries and keys.
    """
    if rows < 1 or top < 1:
        asked = Call("stream", {"rows": rows, "top": top})
        raise Refused(asked, "it needs a query to look from and a key to list", "use for example 512 and 8")
    if not model.family.causal:
        raise Refused(f"attention of {model.name}", "it is an encoder: its heads look ahead, too", "capture patterns")
    tokens = prompts.bind(model)
    if tokens.shortest < 2:
        raise Refused("streamed attention", "a sequence has one token, and nothing to look back at", "leave it out")
    there = [a.layer for a in model.places("pattern") if a.layer is not None]
    if missing := [i for i in layers if i not in there]:
        what, have = f"layers {','.join(map(str, missing))}", f"attention is in layers {', '.join(map(str, there))}"
        raise Refused(what, have, "choose among them")
    chosen = sorted(set(layers)) or there
    longest = int(tokens.lengths.max())
    if mode == "auto":
        mode = "sampled" if longest >= _LONG else "exact"
    plan = _Plan(mode, rows, top, samples, edges(longest), generator(seed))
    parts = [_of_sequence(model, tokens.row(i), chosen, plan) for i in range(len(tokens))]
    return _result(parts, chosen, plan, bucket_names(longest))


@dataclass(frozen=True)
class _Plan:
    mode: Mode
    rows: int
    top: int
    samples: int
    buckets: list[int]
    g: torch.Generator


@dataclass(frozen=True)
class _Found:
    """Statistics of one layer on one sequence.

    Attributes:
        mean: of every cell: types, buckets, entropy, listed attention, and recall if keys were pruned.
        interval: of `mean`, over random queries; NaN where every query counts.
        null: shuffled types.
        key: the listed keys, −1 where a query has fewer.
        weight: the attention to them; NaN where it is not known.
        least: a share that recall reaches, over all queries.
    """

    mean: Float[Tensor, "cell head"]
    interval: Float[Tensor, "cell head bound"]
    null: Float[Tensor, "type head sample"]
    key: Int[Tensor, "head query rank"]
    weight: Float[Tensor, "head query rank"]
    least: Float[Tensor, "*head"]


@dataclass(frozen=True)
class _Sequence:
    """Statistics of one sequence.

    Attributes:
        queries: positions of the queries whose keys are listed.
        rows: positions of those that make means.
        length: number of tokens.
        layers: what is found in each layer.
    """

    queries: Int[Tensor, "query"]
    rows: Int[Tensor, "row"]
    length: int
    layers: list[_Found]


def _of_sequence(model: Model, tokens: Tokens, layers: Sequence[int], plan: _Plan) -> _Sequence:
    """Return the statistics of one sequence, from one forward."""
    ids = tokens.ids[0]
    every = torch.arange(1, len(ids), device=ids.device)
    rows = every
    if plan.mode != "exact" and len(every) > plan.rows:
        rows = 1 + torch.randperm(len(every), generator=plan.g)[: plan.rows].sort().values.to(ids.device)
    found = dict[int, _Found]()

    def see(layer: int, tiles: Tiles) -> None:
        found[layer] = _of_layer(layer, tiles, ids, rows, plan)

    with model.edited(), torch.no_grad(), tiled(model.anatomy, {i: partial(see, i) for i in layers}):
        forward.streams(model.anatomy, tokens, 1.0)
    queries = every if plan.mode == "pruned" else rows
    return _Sequence(queries.cpu(), rows.cpu(), len(ids), [found[i] for i in layers])


def _of_layer(layer: int, tiles: Tiles, ids: Int[Tensor, "position"], rows: Int[Tensor, "row"], plan: _Plan) -> _Found:
    parts, there = list[Looked](), list[Tensor]()
    null = torch.zeros((len(NAMES), plan.samples, tiles.heads), dtype=torch.float64, device=ids.device)
    for some in chunks(rows, tiles.heads):
        asked = Asked.draw(ids, some, plan.samples, plan.g)
        looked, has = look(tiles, asked, plan.top, plan.buckets), asked.there()
        null += (looked.mass[:, 1:] * has[:, 1:, None]).sum(-1)
        there.append(has)
        parts.append(looked.alone())
    looked, has = Looked.join(parts), torch.cat(there, -1)
    cells = [looked.mass[:, 0], looked.distance, looked.entropy[None], looked.weight.sum(-1)[None]]
    key, weight, least = looked.key, looked.weight, Tensor()
    if plan.mode == "pruned":
        kept = pruned.keys(layer, tiles, rows, plan.top)
        found = (kept.score[:, rows - 1] - looked.normaliser[..., None]).exp().sum(-1)
        cells.append((found / looked.weight.sum(-1)).clamp_max(1)[None])
        key, least = kept.key, kept.least.mean(-1)
        weight = torch.full_like(kept.score, math.nan)
        weight[:, rows - 1] = (kept.score[:, rows - 1] - looked.normaliser[..., None]).exp()
    values = torch.cat(cells)  # [cell, head, row]
    use = torch.ones(values.shape[::2], dtype=torch.bool, device=ids.device)
    use[: len(NAMES)] = has[:, 0]
    exact = len(rows) == len(ids) - 1
    mean = torch.stack([v[:, u].mean(-1) for v, u in zip(values, use, strict=True)])
    spread = [mean_interval(v[:, u][:, : 0 if exact else None].T) for v, u in zip(values, use, strict=True)]
    null = null / has[:, 1:].sum(-1)[..., None]
    parts = (mean, torch.stack(spread), null.movedim(1, 2).float(), key.int(), weight, least)
    return _Found(*(x.cpu() for x in parts))


def _result(
    sequences: Sequence[_Sequence], layers: Sequence[int], plan: _Plan, buckets: list[str]
) -> StreamedAttention:
    every = [s.layers for s in sequences]
    mean = torch.stack([torch.stack([x.mean for x in parts], 1) for parts in every])  # [prompt, cell, layer, head]
    there = mean.isfinite().flatten(2).all(2)  # [prompt, cell]
    score = torch.stack([x[some].mean(0) for x, some in zip(mean.unbind(1), there.T, strict=True)])
    if len(sequences) > 1:
        spread = torch.stack([mean_interval(x[some]) for x, some in zip(mean.unbind(1), there.T, strict=True)])
    else:
        spread = torch.stack([x.interval for x in every[0]], 1)
    null = torch.stack([torch.stack([x.null for x in parts], 1) for parts in every])
    null = torch.stack([x[some].mean(0) for x, some in zip(null.unbind(1), there.T[: len(NAMES)], strict=True)])
    k, b = len(NAMES), len(NAMES) + len(buckets)
    score, spread = score.float(), spread.float()
    shares = spread.clamp(0, 1)
    few = {n: "no query has such keys" for n, some in zip(NAMES, there.T, strict=False) if not some.any()}
    why = dict[str, str]()
    if len(sequences) == 1:
        counted, possible = len(sequences[0].rows), sequences[0].length - 1
        if counted in (1, possible):
            said = "of which every query counts" if counted == possible else "of which one query counts"
            why |= dict.fromkeys(("mass", "distance", "entropy", "listed", "recall"), f"one sequence, {said}")
    recall, recall_interval, least = torch.ones_like(score[b]), torch.ones_like(spread[b]), torch.ones_like(score[b])
    if plan.mode == "pruned":
        recall, recall_interval = score[b + 2], shares[b + 2]
        least = torch.stack([torch.stack([x.least for x in p]) for p in every]).mean(0).float()
        why["weight"] = "it is known for the queries that are sampled"
    return StreamedAttention(
        mass=score[:k],
        interval=shares[:k],
        null=null,
        distance=score[k:b].movedim(0, -1),
        distance_interval=shares[k:b].movedim(0, -2),
        uniform=_uniform([s.rows for s in sequences], plan.buckets),
        entropy=score[b],
        entropy_interval=spread[b].clamp_min(0),
        listed=score[b + 1],
        listed_interval=shares[b + 1],
        recall=recall,
        recall_interval=recall_interval,
        least_recall=least,
        position=_together([s.queries for s in sequences], -1, 0),
        key=_together([torch.stack([x.key for x in parts]) for parts in every], -1, 2),
        weight=_together([torch.stack([x.weight for x in parts]).float() for parts in every], math.nan, 2),
        labels={"type": list(NAMES), "layer": list(layers), "bucket": buckets, "bound": BOUNDS},
        units=_UNITS,
        reasons=few | why,
        record={"mode": plan.mode, "queries": [len(s.rows) for s in sequences]},
    )


def _together(parts: Sequence[Tensor], filler: float, axis: int) -> Tensor:
    """Return sequences beside each other on a new axis in front of that of their queries."""
    longest = max(p.shape[axis] for p in parts)
    out = []
    for p in parts:
        more = torch.full((*p.shape[:axis], longest - p.shape[axis], *p.shape[axis + 1 :]), filler, dtype=p.dtype)
        out.append(torch.cat([p, more], axis))
    return torch.stack(out, axis)


def _uniform(rows: Sequence[Int[Tensor, "row"]], buckets: Sequence[int]) -> Float[Tensor, "bucket"]:
    """Return the attention by distance of a head that looks at everything alike."""
    least = torch.tensor(buckets).double()
    each = []
    for q in rows:
        closer = torch.minimum(least, q[:, None].double() + 1)  # keys nearer than each bucket
        most = torch.cat([closer[:, 1:], q[:, None].double() + 1], 1)
        each.append(((most - closer) / (q[:, None] + 1)).mean(0))
    return torch.stack(each).mean(0).float()
