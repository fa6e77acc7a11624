"""Tokens that the output circuit of one head promotes and suppresses, the vocabulary a block at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.stats import generator, rotation
from cutaway.models import circuits
from cutaway.models.model import Model

_BLOCK = 1 << 13  # tokens of the vocabulary at once
_CELLS = 1 << 23  # of sources × vocabulary at once


class Written(NamedTuple):
    """Pairs of a token attended to and a token written, the strongest promoted first, then the strongest suppressed.

    Strengths are logits less the mean over the vocabulary, in standard deviations of a source's effects there.

    Attributes:
        source: number of the token attended to.
        target: id of the token written.
        strength: strength of the pair.
        null: strengths of as strong pairs when values are turned at random.
        own: strength of every source with itself.
        own_null: the same with the targets of other sources, averaged over sources.
    """

    source: Int[Tensor, "pair"]
    target: Int[Tensor, "pair"]
    strength: Float[Tensor, "pair"]
    null: Float[Tensor, "pair sample"]
    own: Float[Tensor, "source"]
    own_null: Float[Tensor, "sample"]


@torch.no_grad()
def toward(model: Model, place: Address) -> Float[Tensor, "token d_head"]:
    """Return the directions at a head's z that raise each token over the mean, the final norm's scale left out.

    Raises:
        Refused: what the head writes is normed again with the stream, or logits are not linear in it.
    """
    layer, dtype, parts = place.layer or 0, torch.promote_types(model.dtype, torch.float32), list[Tensor]()
    out = model.weights.o[layer][place.unit].detach()  # [d_head, d_model]
    for ids in torch.arange(model.shape.d_vocab, device=model.device).split(_BLOCK):
        rows = circuits.readers(model, layer, ids, dtype)
        parts.append(rows @ out.to(rows).T)
    whole = torch.cat(parts)
    return whole - whole.mean(0)


@torch.no_grad()
def bare_values(model: Model, place: Address, ids: Int[Tensor, "source"]) -> Float[Tensor, "source d_head"]:
    """Return the values of bare embeddings of tokens, through the norm before attention.

    Raises:
        Refused: values are not linear in what attention reads.
    """
    rows = circuits.as_read(model, place.layer or 0, model.weights.embed[ids.to(model.device)].detach())
    return rows @ circuits.ov(model, [place]).left[0].to(rows)


@torch.no_grad()
def written(
    values: Float[Tensor, "source d_head"],
    ids: Int[Tensor, "source"],
    away: Float[Tensor, "token d_head"],
    pairs: int,
    samples: int,
    seed: int,
) -> Written:
    """Return the strongest pairs of sources with these values; each source is in one pair of each sign at most."""
    g, ids = generator(seed), ids.to(away.device)
    values = values.to(away)
    k = min(max(pairs, 1), len(values))
    source, target, strength = _strongest(values, away, k)
    turned = (values @ rotation(values.shape[1], g).to(values) for _ in range(samples))
    null = [_strongest(x, away, k)[2] for x in turned]
    rows = circuits.standardised(values, away)
    steps = torch.randint(1, max(len(ids), 2), (samples,), generator=g).tolist()
    others = [(rows * away[ids.roll(step)]).sum(-1).mean() for step in steps]
    found = source, target, strength, torch.stack(null, -1), (rows * away[ids]).sum(-1), torch.stack(others)
    return Written(*(x.cpu() for x in found))


def _strongest(values: Tensor, away: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return source, target and strength of the k most promoted and the k most suppressed pairs."""
    rows = circuits.standardised(values, away)
    both = dict[str, list[Tensor]](max=[], argmax=[], min=[], argmin=[])
    for some in rows.split(max(1, _CELLS // len(away))):
        effect = some @ away.T
        for way in ("max", "min"):
            value, at = getattr(effect, way)(-1)
            both[way].append(value)
            both[f"arg{way}"].append(at)
    up, down = (torch.cat(both[way]) for way in ("max", "min"))
    high, low = up.topk(k).indices, down.topk(k, largest=False).indices
    targets = torch.cat([torch.cat(both["argmax"])[high], torch.cat(both["argmin"])[low]])
    return torch.cat([high, low]), targets, torch.cat([up[high], down[low]])
