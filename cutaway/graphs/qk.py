"""Which features make a head look where it looks?

QK attribution (Kamath et al. 2025, transformer-circuits.pub/2025/attention-qk): an attention graph takes patterns as
given; here the score of one head, query and key is split into pairs of what the query is made of and what the key is.

* Definition: with divisors of norms frozen, the query q = Σ_i q_i and the key k = Σ_j k_j are sums over sources of the
  graph (features, errors, tokens) along residual stream and OV circuits, and over biases as sources of their own. The
  score before the softmax (and before a soft cap) is s = scale · q · k = Σ_ij `pair[i, j]`, rotary positions and norms
  of queries and keys included. Sums that miss the model's score by more than rounding are a refusal.
* `pair` holds the `top` sources of each side, `rest` what all other pairs sum to. `query[i]` = scale · q_i · k and
  `key[j]` = scale · q · k_j are what one source brings with the whole other side. Both hold the same mass: never sum
  them together.
* `contrast`: a softmax sees differences alone. The same pairs, less their mean over all keys of this query: a pair that
  raises all keys alike has none, and no effect. Sources are chosen by it (`by`).
* `lost`: the probability that the key loses without the pair's part of its score, all other scores as they are.
* Control (`pair_null`): random vectors as long as q_i and k_j in their place.
* Known failures: first positions often win for want of anything else (see `score` of all keys); sources that two sides
  share count in both; a head is one of many. No interval: it is one prompt, the first of several.
* Equivalences (tests): queries and keys by hooks in the frozen model; with sources that are tokens alone (layer 0),
  products of embeddings; `lost` is what an edit of the scores changes.
* Cost: that of `graphs.trace`, and one forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import generator
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.graphs.frozen import Frozen
from cutaway.graphs.sides import Look, Sides
from cutaway.graphs.subject import Neurons
from cutaway.graphs.trace import prepare
from cutaway.lenses.closure import check_closure
from cutaway.models.circuits import heads
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class QkAttribution(Result, kind="qk_attribution"):
    """The score of one head, query and key as pairs of sources.

    Attributes:
        pair: the part of the score that two sources make together.
        pair_null: the same of random vectors as long as their parts of query and key.
        contrast: the pair less its mean over all keys of the query.
        lost: the probability that the key loses without the pair.
        query: what a source of the query makes with the whole key.
        key: what a source of the key makes with the whole query.
        rest: the sum of all other pairs.
        rest_contrast: the same less its mean over keys.
        score: the head's scores of all keys; NaN where a mask hides them.
        pattern: its probabilities.
        residual: what all pairs miss of the score.
    """

    page = ("contrast", "score")

    pair: Float[Tensor, "query_node key_node"]
    pair_null: Float[Tensor, "query_node key_node sample"]
    contrast: Float[Tensor, "query_node key_node"]
    lost: Float[Tensor, "query_node key_node"]
    query: Float[Tensor, "query_node"]
    key: Float[Tensor, "key_node"]
    rest: Float[Tensor, ""]
    rest_contrast: Float[Tensor, ""]
    score: Float[Tensor, "k_pos"]
    pattern: Float[Tensor, "k_pos"]
    residual: Float[Tensor, ""]


@method(
    answers="Which features make a head look where it looks?",
    paper="Kamath et al. 2025, transformer-circuits.pub/2025/attention-qk",
    cost="4 * F",
    control="random_vector",
    rung="observational",
)
@torch.no_grad()
def qk(
    model: Model,
    task: Task | Prompts,
    transcoders: Dictionary | Neurons,
    /,
    *,
    head: str = "",
    query: int | None = None,
    key: int | None = None,
    top: int = 10,
    by: Literal["contrast", "score"] = "contrast",
    leading: int | None = None,
    samples: int = 10,
    seed: int = 0,
) -> QkAttribution:
    """Split the score of one head, query and key into pairs of features, errors, tokens and biases.

    Args:
        head: `layer.head` [default: the one that looks most at one earlier position but the first].
        query: the position that looks [default: the last].
        key: the position that is looked at [default: where the head looks most, the first position left out].
        top: how many sources of each side are shown.
        by: the size that chooses them: the change against other keys, or the part of the score.
        leading: leading positions whose units are no nodes, as in `trace`.
        samples: how many random vectors make the null.
        seed: of the random vectors.

    Raises:
        Refused: what `trace` refuses, no such head or position, scores that are no products of queries and keys, or
            pairs that do not sum to the score.
    """
    run = prepare(model, task, transcoders, (), logits=1, mass=1.0, leading=leading, samples=2, seed=seed)
    look = _look(run.frozen, head, query, key)
    sides = Sides(run, look)
    if by == "contrast" and len(sides.keys) < 2:
        raise Refused(f"contrast of position {look.query}", "it sees one key alone", Keyword("by", "score"))
    marginal = sides.marginals()
    first, second = (_largest(m, sides.at, by, top) for m in marginal)
    every = torch.einsum("id,kjd->kij", sides.query[first], sides.parts[:, second])
    whole = sides.parts.sum(1) @ sides.query.sum(0)
    pair, contrast = every[sides.at], every[sides.at] - every.mean(0)
    residual = sides.score[look.key] - whole[sides.at]
    sizes = sides.query.norm(dim=1).sum() * sides.parts[sides.at].norm(dim=1).sum()
    check_closure("QK attribution", model, residual[None], sides.score[sides.keys], sizes[None])
    return QkAttribution(
        pair=pair.cpu(),
        pair_null=_random(sides, first, second, samples, seed).cpu(),
        contrast=contrast.cpu(),
        lost=_lost(sides, pair).cpu(),
        query=marginal[0][sides.at, first].cpu(),
        key=marginal[1][sides.at, second].cpu(),
        rest=(whole[sides.at] - pair.sum()).cpu(),
        rest_contrast=(whole[sides.at] - whole.mean() - contrast.sum()).cpu(),
        score=sides.score.cpu(),
        pattern=sides.pattern.cpu(),
        residual=residual.cpu(),
        labels={
            "query_node": [sides.name(i) for i in first.tolist()],
            "key_node": [sides.name(i) for i in second.tolist()],
            "k_pos": [f"{p} {word}" for p, word in enumerate(run.tokens.pieces[0])],
        },
        units=dict.fromkeys(("pair", "pair_null", "contrast", "query", "key", "score"), "of its score")
        | {"lost": "probability"},
        reasons={"pair": "one prompt"},
        record=_record(sides, float(whole[sides.at]), float(residual)),
    )


def _look(frozen: Frozen, head: str, query: int | None, key: int | None) -> Look:
    """Return the head and positions that are asked, or where a head looks most at an earlier position."""
    width = frozen.width
    query = width - 1 if query is None else query
    if query >= width:
        raise Refused(Keyword("query", query), f"the prompt has {width} tokens", "give one of its positions")
    if key is not None and not 0 <= key <= query:
        why = f"position {query} sees keys 0 to {query}"
        raise Refused(Keyword("key", key), why, "give one of these")
    layers = range(frozen.layers)
    places = [(a.layer or 0, a.unit or 0) for a in heads(frozen.model, [head])] if head else []
    if len(places) > 1:
        raise Refused(Keyword("head", head), f"it means {len(places)} heads", "give one")
    found = torch.stack([frozen.at(f"pattern.{i}")[:, query] for i in layers])  # [layer, head, k_pos]
    allowed = torch.zeros_like(found, dtype=torch.bool)
    where = slice(key, key + 1) if key is not None else slice(min(1, query - 1), query) if query else slice(0, 1)
    for i, h in places or [(slice(None), slice(None))]:
        allowed[i, h, where] = True
    best = int(torch.where(allowed, found, -1.0).argmax())
    per_layer = found.shape[1] * found.shape[2]
    return Look(best // per_layer, best % per_layer // found.shape[2], query, best % found.shape[2])


def _largest(marginal: Float[Tensor, "key source"], at: int, by: str, top: int) -> Int[Tensor, "chosen"]:
    """Return the sources of the largest size, the largest first."""
    size = (marginal[at] - (marginal.mean(0) if by == "contrast" else 0.0)).abs()
    n = min(top, int((size > 0).sum()))
    if n < 1:
        raise Refused((Keyword("top", top), " sources"), "none has a part in the score", "give a larger number")
    return size.topk(n).indices


def _random(
    sides: Sides, first: Int[Tensor, "_"], second: Int[Tensor, "_"], samples: int, seed: int
) -> Float[Tensor, "query_node key_node sample"]:
    """Return the pairs of random vectors as long as each source's part of the query and of the key."""
    g = generator(seed)

    def alike(parts: Float[Tensor, "some d_head"]) -> Float[Tensor, "sample some d_head"]:
        drawn = torch.randn(samples, *parts.shape, generator=g).to(parts)
        return drawn / drawn.norm(dim=-1, keepdim=True) * parts.norm(dim=-1, keepdim=True)

    return torch.einsum("sid,sjd->ijs", alike(sides.query[first]), alike(sides.parts[sides.at, second]))


def _lost(sides: Sides, pair: Float[Tensor, "query_node key_node"]) -> Float[Tensor, "query_node key_node"]:
    """Return the probability that the key loses without each pair, all other scores as they are."""
    own, p = sides.score[sides.look.key], sides.pattern[sides.look.key]
    factor = (sides.form.capped(own - pair) - sides.form.capped(own)).exp()
    return p - p * factor / (1 - p + p * factor)


def _record(sides: Sides, score: float, residual: float) -> dict[str, object]:
    look, words = sides.look, sides.run.tokens.pieces[0]
    return {
        "prompt": sides.run.tokens.texts[0] or sides.run.tokens.ids[0].tolist(),
        "head": f"{look.layer}.{look.head}",
        "query": f"{look.query} {words[look.query]}",
        "key": f"{look.key} {words[look.key]}",
        "closure": {"largest residual": abs(residual), "score": score},
        "scale": sides.form.scale,
        "soft cap": sides.form.cap,
        "frozen": "attention patterns before the layer and divisors of all norms, at their values in this run",
    }
