"""How far back does a head look, whatever the tokens are?

Rotary positions turn queries and keys, so that a head's scores depend on the distance between them. Embeddings, through
the norm before attention, are queries and keys of a head at each distance (Elhage et al. 2021, A mathematical framework
for transformer circuits, with the rotation of Su et al. 2021, arXiv:2104.09864, put in between), biases included.

* `score[head, offset]`: mean attention score of a token with every token of the vocabulary, that many tokens back, less
  its mean over the offsets asked for: in the model's own units, of which the softmax takes the exponential. It has an
  interval over tokens that attend (`interval`).
* `share[head]`: share of the variance of a token's scores, over offsets and tokens attended to, that the offset alone
  explains. 1 is a head that looks at places, 0 one that looks at tokens. It has an interval too.
* Control (`null`, `share_null`): keys whose mean over the vocabulary points in a random direction of the stream, as far
  from 0 as their own. Their spread, the queries and the rotation are kept.
* Both are exact over the vocabulary, from the mean and the covariance of the keys: tokens × tokens is never made.
* `texts`: heads read streams of that many texts of random tokens, in place of bare embeddings: every position's query
  with every position's key, wherever they stood, so that what they say of one another is mixed and distance is not. The
  first position, a sink in trained models, is left out.
* Assumption: without `texts`, that heads read bare embeddings: a late head whose queries and keys point the same way in
  all streams, but not in embeddings, shows nothing. Distances are those of short prompts, where scaled frequencies
  depend on length.
* Known failures: a share is over the offsets asked for; a head that turns slowly looks more positional over farther
  ones. Sliding windows and the causal mask are not looked at.
* Equivalences (tests): the model's own scores on bare embeddings, for every pair of tokens multiplied out.
* Cost: one forward of a short prompt, which tells how positions turn queries, and those of the texts. One product of
  the vocabulary with the keys of every key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, ratio_interval
from cutaway.models import circuits as weights
from cutaway.models.model import Model
from cutaway.models.rotary import Rotary, check_offsets, rotaries
from cutaway.models.tokens import batch

_LENGTH = 64  # tokens of a text
OFFSETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True, kw_only=True)
class Distances(Result, kind="distances"):
    """Scores of heads by distance, whatever the tokens are.

    Attributes:
        score: the mean score at a distance, less that over all offsets.
        interval: of `score`, 95 %, over tokens that attend.
        null: `score` of keys whose mean points in a random direction.
        share: the share of the variance of scores that the offset explains.
        share_interval: of `share`, 95 %, over tokens that attend.
        share_null: `share` of such keys.
    """

    score: Float[Tensor, "head offset"]
    interval: Float[Tensor, "head offset bound"]
    null: Float[Tensor, "head offset sample"]
    share: Float[Tensor, "head"]
    share_interval: Float[Tensor, "head bound"]
    share_null: Float[Tensor, "head sample"]


@method(
    answers="How far back does a head look, whatever the tokens are?",
    paper="Elhage et al. 2021, A mathematical framework for transformer circuits; Su et al. 2021, arXiv:2104.09864",
    cost="(1 + texts) * F",
    control="rotated_basis",
    rung="observational",
)
@torch.no_grad()
def distances(
    model: Model,
    /,
    *,
    heads: tuple[str, ...] = (),
    offsets: tuple[int, ...] = (),
    sources: int = 256,
    texts: int = 0,
    samples: int = 8,
    seed: int = 0,
) -> Distances:
    """Read off their weights at which distances heads score keys high.

    Args:
        heads: these, as `layer.head` or `layer.*` [default: all].
        offsets: distances from query to key, in tokens, to which 0 is added [default: to 32, the farther the sparser].
        sources: how many tokens attend, their ids evenly spaced; 0 takes all.
        texts: how many texts of random tokens heads read, in place of bare embeddings.
        samples: how many random directions make the null.
        seed: of the directions.

    Raises:
        Refused: an encoder, no such head or offset, positions that are not rotary, or queries and keys that are normed.
    """
    places = _causal_heads(model, heads)
    offsets = offsets or tuple(o for o in OFFSETS if o < model.shape.context)
    check_offsets(model, offsets)
    if not any(offsets):
        raise Refused("offsets 0", "nothing is compared with distance zero", "write for example 1,2,4,8")
    form, steps, g = weights.qk(model, places), sorted({0, *offsets}), generator(seed)
    layers, group = [a.layer or 0 for a in places], model.shape.n_heads // model.shape.n_kv_heads
    turns, read = rotaries(model, layers), _read(model, layers, texts)
    rows = len(read[layers[0]])
    ids = torch.linspace(0, rows - 1, max(2, min(sources or rows, rows))).long().unique()
    sides, keys, found = weights.readable(model), dict[tuple[int, int], tuple[Tensor, Tensor]](), list[list[Tensor]]()
    for layer, place, left, right in zip(layers, places, form.left, form.right, strict=True):
        unit, x = place.unit or 0, read[layer]
        if (key := (layer, unit // group)) not in keys:  # heads of one group have the same keys
            mean = x.mean(0)
            drawn = torch.randn(samples, len(mean), generator=g).to(mean)
            drawn = drawn - drawn.mean(-1, keepdim=True) if weights.centred(model) else drawn
            means = torch.cat([mean[None], drawn * (mean.norm() / drawn.norm(dim=-1, keepdim=True))])
            y = (x - mean) @ right.to(x).T
            centres = means @ right.to(x).T + sides.k_bias[layer][unit // group].detach().to(x)
            keys = {key: (centres.double(), (y.T @ y / len(y)).double())}
        queries = x[ids] @ left.to(x) + sides.q_bias[layer][unit].detach().to(x)
        found.append(_profile(queries.double(), *keys[key], turns[layer], steps))
    score, share, between = (torch.stack([f[n] for f in found]).cpu() for n in range(3))
    return Distances(
        score=score[..., 0].mean(1).float(),
        interval=mean_interval(score[..., 0].movedim(1, 0)),
        null=score[..., 1:].mean(1).float(),
        share=share[:, 0].float(),
        share_interval=ratio_interval(between[:, :, 0, 0].T, between[:, :, 1, 0].T, within=(0.0, 1.0)),
        share_null=share[:, 1:].float(),
        labels={"head": [f"{a.layer}.{a.unit}" for a in places], "offset": [str(o) for o in steps], "bound": BOUNDS},
        units={"score": "attention score", "share": "share of variance"},
        record={"sources": len(ids), "read": f"{texts} texts of random tokens" if texts else "bare embeddings"},
    )


@torch.no_grad()
def pair_scores(
    model: Model, head: str, queries: Int[Tensor, "query"], keys: Int[Tensor, "key"], offset: int = 0
) -> Float[Tensor, "query key"]:
    """Return the attention scores of a head between bare tokens at a distance, as the model scales them.

    Args:
        model: the model.
        head: `layer.head`.
        queries: token ids that attend.
        keys: token ids that they attend to.
        offset: the distance from query to key, in tokens.

    Raises:
        Refused: no such head or offset, positions that are not rotary, or queries and keys that are normed.
    """
    check_offsets(model, [offset])
    (place,) = _causal_heads(model, [head])
    embed, form, layer, unit = weights.embedded(model), weights.qk(model, [place])[0], place.layer or 0, place.unit or 0
    rotary, sides = rotaries(model, [layer])[layer], weights.readable(model)
    kv = unit // (model.shape.n_heads // model.shape.n_kv_heads)
    q = embed[queries] @ form.left.to(embed) + sides.q_bias[layer][unit].detach().to(embed)
    k = embed[keys] @ form.right.to(embed).T + sides.k_bias[layer][kv].detach().to(embed)
    return rotary.scale * rotary.turned(q, offset) @ k.T


def _read(model: Model, layers: Sequence[int], texts: int) -> dict[int, Float[Tensor, "row d_model"]]:
    """Return what heads of some layers read, through the norm's centre and scale: embeddings, or streams of texts."""
    if not texts:
        return dict.fromkeys(layers, weights.embedded(model))
    ids = torch.randint(0, model.shape.d_vocab, (texts, min(_LENGTH, model.shape.context)), generator=generator(0))
    acts = model.capture(batch(ids.tolist()), [f"resid_pre.{i}" for i in sorted(set(layers))])
    return {i: weights.as_read(model, i, acts[f"resid_pre.{i}"][:, 1:].flatten(0, 1)) for i in set(layers)}


def _causal_heads(model: Model, heads: Sequence[str]) -> list[Address]:
    if not model.family.causal:
        raise Refused(f"distances in {model.name}", "it is an encoder", "ask a causal model")
    return weights.heads(model, heads)


def _profile(
    queries: Float[Tensor, "source d_head"],
    centres: Float[Tensor, "draw d_head"],
    covariance: Float[Tensor, "d_head d_head"],
    rotary: Rotary,
    offsets: Sequence[int],
) -> list[Tensor]:
    """Return the scores less their mean over offsets [source, offset, draw], the share of variance that offsets explain
    [draw], and its two sides by source [source, two, draw], of the keys' own mean first.
    """
    turned = rotary.scale * torch.stack([rotary.turned(queries, o) for o in offsets], 1)  # [source, offset, d_head]
    score = turned @ centres.T
    score = score - score.mean(1, keepdim=True)
    within = torch.einsum("soh,hi,soi->so", turned, covariance, turned).mean(1)  # over tokens attended to
    across = score.square().mean(1)  # [source, draw]
    whole = across + within[:, None]
    return [score, across.mean(0) / whole.mean(0).clamp_min(1e-300), torch.stack([across, whole], 1)]
