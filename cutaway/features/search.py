"""Search among the latents of a store: by label, peak token, phrase, your own text, a word they raise, likeness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.features import effects
from cutaway.features.reading import read_text
from cutaway.features.store.corpus import CODED, COUNTED
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.latents import StoredLatents
from cutaway.models import circuits
from cutaway.models.anatomy.weights import logit_readers
from cutaway.models.model import Model


@dataclass(frozen=True)
class Hit:
    """A latent that was found.

    Attributes:
        dictionary: name of its dictionary.
        latent: its number.
        score: what hits are ranked by; higher is better.
        why: the score in words, beside what chance would give.
    """

    dictionary: str
    latent: int
    score: float
    why: str


def by_label(store: FeatureStore, words: str, most: int = 20) -> list[Hit]:
    """Return latents whose labels hold all words, the best first (BM25)."""
    found = store.meta.find(words, most)
    return [Hit(x.dictionary, x.latent, -float(i), f"{x.source}: {x.text}") for i, x in enumerate(found)]


def by_peak_token(store: FeatureStore, text: str, dictionary: str | None = None, most: int = 20) -> list[Hit]:
    """Return latents whose largest examples stand on a token, by the share of those examples.

    Raises:
        Refused: the text is not one token.
    """
    known, tokens = store.latents(dictionary), store.token_ids(text)
    if len(tokens) != 1:
        instead = "give one token, with the space before it if it has one, or search for a phrase"
        raise Refused(f"token {text!r}", f"it is {len(tokens)} tokens here", instead)
    place, ids = known.tensors["top.place"], store.column("ids").flatten()
    there = place >= 0
    share = ((ids[place.clamp(min=0)] == tokens[0]) & there).sum(1) / there.sum(1).clamp(min=1)
    base = float((ids == tokens[0]).sum() / (ids >= 0).sum())
    return [
        Hit(known.name, i, v, f"{v:.0%} of its largest examples; {base:.2%} of all tokens")
        for i, v in _best(share, most)
        if v > 0
    ]


def by_phrase(store: FeatureStore, text: str, dictionary: str | None = None, most: int = 20) -> list[Hit]:
    """Return latents that are active at the end of a phrase, by how far they prefer it: share less density.

    Raises:
        Refused: the phrase is not in the part of the corpus whose codes are kept.
    """
    known, ids, flags = store.latents(dictionary), store.column("ids"), store.column("flags")
    end = torch.zeros(ids.shape, dtype=torch.bool)
    for tokens in {tuple(store.token_ids(t)) for t in (text, f" {text.lstrip()}")}:
        end |= _ends(ids, tokens)
    places = (end & (flags & (COUNTED | CODED) == COUNTED | CODED)).flatten().nonzero()[:, 0]
    if not len(places):
        raise Refused(f"phrase {text!r}", "it is not in the corpus whose codes are kept", "search for fewer words")
    fires = torch.zeros(len(known), dtype=torch.long)
    for part in known.shards():
        latent = torch.arange(len(known)).repeat_interleave(part["first"].diff())
        fires += torch.bincount(latent[torch.isin(part["place"], places)], minlength=len(known))
    share = fires / len(places)
    score = share - known.density
    return [
        Hit(known.name, i, v, f"on {share[i]:.0%} of {len(places)} places; on {known.density[i]:.2%} of all tokens")
        for i, v in _best(score, most)
        if fires[i] > 0
    ]


@torch.no_grad()
def by_text(
    store: FeatureStore, text: str, model: Model, source: Dictionary, dictionary: str | None = None, most: int = 20
) -> list[Hit]:
    """Return latents that fire on a text of yours, by |activation| as a share of the largest in the store, times the
    logarithm of 1 / density.

    Raises:
        Refused: another model or dictionary than was harvested.
    """
    known = _checked(store, model, source, dictionary)
    read = read_text(model, source, text)
    largest, at = read.code.dense().abs().masked_fill(read.special[:, None], 0).max(0)
    share = largest / known.tensors["largest"].clamp_min(1e-30)
    rare = -known.density.clamp_min(1 / max(known.tokens, 1)).log10()
    hits = list[Hit]()
    for i, v in _best(share * rare, most):
        where = f"{float(largest[i]):.3g} at {read.words[int(at[i])]!r}, {float(share[i]):.0%} of its largest"
        hits += [Hit(known.name, i, v, f"{where}; on {known.density[i]:.2%} of all tokens")] if v > 0 else []
    return hits


@torch.no_grad()
def by_raised_word(
    store: FeatureStore, word: str, model: Model, source: Dictionary, dictionary: str | None = None, most: int = 20
) -> list[Hit]:
    """Return latents whose direct effect on the logit of a word is largest, in standard deviations over the vocabulary.

    Raises:
        Refused: the word is not one token, or latents that do not write the residual stream.
    """
    known = _checked(store, model, source, dictionary)
    readers = logit_readers(model.anatomy, dtype=torch.float32).detach()
    away = readers - readers.mean(0)
    rows = effects.rows_to_logits(model, source)
    score = (circuits.standardised(rows, away) @ away[model.text.token_id(word)]).cpu()
    return [Hit(known.name, i, v, f"{v:+.2f} standard deviations over the vocabulary") for i, v in _best(score, most)]


@torch.no_grad()
def by_likeness(
    store: FeatureStore, latent: int, source: Dictionary, dictionary: str | None = None, most: int = 20
) -> list[Hit]:
    """Return latents of the same block with the most similar decoder rows, by cosine.

    Raises:
        Refused: no such latent, or another dictionary than was harvested.
    """
    known = store.latents(dictionary)
    store.check_dictionary(source, known.name)
    rows, first = effects.decoder_rows(source, known.check(latent))
    cosine = rows @ rows[latent - first]
    cosine[latent - first] = -2
    return [Hit(known.name, first + i, v, f"cosine {v:.3f}") for i, v in _best(cosine, most) if v > -2]


def _checked(store: FeatureStore, model: Model, source: Dictionary, dictionary: str | None) -> StoredLatents:
    known = store.latents(dictionary)
    store.check(known, model, source)
    return known


def _ends(ids: Int[Tensor, "context position"], tokens: Sequence[int]) -> Bool[Tensor, "context position"]:
    """Return True at the last token of every place where some tokens follow each other."""
    out = torch.zeros_like(ids, dtype=torch.bool)
    if 0 < len(tokens) <= ids.shape[1]:
        out[:, len(tokens) - 1 :] = (ids.unfold(1, len(tokens), 1) == ids.new_tensor(tokens)).all(-1)
    return out


def _best(score: Float[Tensor, "latent"], most: int) -> Sequence[tuple[int, float]]:
    values, at = score.sort(descending=True, stable=True)
    return list(zip(at[:most].tolist(), values[:most].tolist(), strict=True))
