"""Minimal pairs of a latent: its activation when the token at its peak is exchanged for another, in the same context.

Of each of its largest examples only the peak token changes. `change` = (f with the other token − f) / |f|, at the same
position: 0 is unchanged, −1 is silent. Two kinds of neighbours take its place: tokens of largest cosine with the peak
token's row of the embedding, and random tokens of the same class (digits, capitals, a space in front or none). Control:
random tokens of any class. A latent of the very token is silent on all; one of a class stays on its class alone; one
that reads the context stays on random tokens too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.dictionaries.dictionary import Dictionary
from cutaway.features.rules.families import token_class
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.latents import Example
from cutaway.models.model import Model
from cutaway.models.tokens import batch
from cutaway.models.vocabulary import special_ids

KINDS = ("nearest by embedding", "same class")


def swapped(
    model: Model,
    store: FeatureStore,
    d: Dictionary,
    latent: int,
    examples: Sequence[Example],
    tokens: int,
    samples: int,
    g: torch.Generator,
) -> tuple[Float[Tensor, "example kind"], Float[Tensor, "example sample"], list[int]]:
    """Return the mean change of each example by kind of neighbour, its change by each random token, and the nearest
    tokens of the first example.

    Args:
        model: the model.
        store: the store, which has the contexts.
        d: the dictionary.
        latent: number of the latent.
        examples: places where it is active.
        tokens: number of neighbours of each kind.
        samples: number of random tokens.
        g: draws tokens.

    Raises:
        Refused: the model's embedding cannot be read.
    """
    rows = torch.nn.functional.normalize(model.weights.embed.detach().float(), dim=1)
    classes = _classes(tuple(store.vocabulary(len(rows))))
    usable = ~torch.isin(torch.arange(len(rows)), special_ids(model.tokenizer).cpu())
    changes, chance, first = list[Tensor](), list[Tensor](), list[int]()
    for e in examples:
        ids = store.context(e.context)["ids"]
        ids = ids[ids >= 0].long()
        peak = int(ids[e.position])
        others = usable & (torch.arange(len(rows)) != peak)
        near = (rows @ rows[peak]).cpu().masked_fill(~others, -2).topk(tokens).indices
        alike = _drawn(others & (classes == classes[peak]), tokens, g)
        anything = _drawn(others, samples, g)
        first = first or near.tolist()
        own, changed = _activations(model, d, latent, ids, e.position, torch.cat([near, alike, anything]))
        parts = ((changed - own) / own.abs()).split([len(near), len(alike), len(anything)])
        changes.append(torch.stack([x.mean() for x in parts[:2]]))
        chance.append(parts[2])
    return torch.stack(changes), torch.stack(chance), first


def _drawn(mask: Bool[Tensor, "token"], most: int, g: torch.Generator) -> Int[Tensor, "n"]:
    """Return random tokens of those that are marked, without repeats."""
    there = mask.nonzero()[:, 0]
    return there[torch.randperm(len(there), generator=g)[:most]]


def _activations(
    model: Model, d: Dictionary, latent: int, ids: Tensor, position: int, others: Int[Tensor, "n"]
) -> tuple[Tensor, Float[Tensor, "n"]]:
    """Return the activation of a latent at a position, and those with other tokens there."""
    variants = ids.repeat(1 + len(others), 1)  # [variant position]
    variants[1:, position] = others
    acts = model.capture(batch(variants.tolist()).to(model.device), list(d.reads), logits=False)
    code = d.encode({s: acts[s][:, position].to(d.device) for s in d.reads})
    found = code.columns([latent])[:, 0].cpu()
    return found[0], found[1:]


@lru_cache(1)
def _classes(texts: tuple[str, ...]) -> Int[Tensor, "token"]:
    """Return the class of each token, that of a token with a space in front apart from that of one without."""
    return torch.tensor([2 * token_class(t) + t.startswith((" ", "▁", "Ġ")) for t in texts])
