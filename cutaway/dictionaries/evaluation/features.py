"""Which latents are worth reading, and where do they fire?

For every chosen latent: how often it fires, its mean where active, and the tokens on which it is largest, each with its
place, so that its context can be shown. Latents are ranked by how clear they are: by the share of a latent's activation
that falls on one token id (`focus`), or by frequency or size. A `focus` of 1 says that a latent is a token detector;
`focus_null` is that of a latent that fires as often on random tokens. Such contexts are what Bricken et al. 2023 read.

Control: the same latents with the tokens in random order. Cost: no forward; the dictionary is run over the evidence
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.record import machine, versions
from cutaway.core.refuse import Code, Refused
from cutaway.core.result import Result
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence, encode_evidence
from cutaway.dictionaries.evaluation.scores import control_generator
from cutaway.models.model import Model

By = Literal["focus", "frequency", "size"]
CUT = "…"


@dataclass(frozen=True, kw_only=True)
class Features(Result, kind="dictionary_features"):
    """Chosen latents with their largest activations.

    `latent` names them; `largest` are their largest activations, on `token` (numbers of tokens in the evidence) with
    the ids `ids`; unused places are NaN and −1.
    """

    focus: Float[Tensor, "chosen"]
    focus_null: Float[Tensor, "chosen sample"]
    frequency: Float[Tensor, "chosen"]
    mean_active: Float[Tensor, "chosen"]
    largest: Float[Tensor, "chosen rank"]
    token: Int[Tensor, "chosen rank"]
    ids: Int[Tensor, "chosen rank"]
    latent: Int[Tensor, "chosen"]


@method(
    answers="Which latents are worth reading, and where do they fire?",
    paper="Bricken et al. 2023, Towards Monosemanticity",
    cost="0",
    control="shuffled_tokens",
    rung="observational",
)
def features(
    dictionary: Dictionary,
    evidence: Evidence,
    /,
    *,
    n: int = 10,
    by: By = "focus",
    contexts: int = 8,
    least: int = 10,
    samples: int = 2,
    seed: int = 0,
) -> Features:
    """Choose latents by focus, frequency or size, with the tokens on which they are largest.

    Args:
        n: number of latents.
        by: rank latents by focus, by frequency, or by size (the mean where active).
        contexts: number of largest activations of each.
        least: number of tokens on which a latent must fire.
        samples: number of draws of the null of the focus.
        seed: seed of the null.

    Raises:
        Refused: the evidence has no token ids, or no latent fires often enough.
    """
    encoded = encode_evidence(dictionary, evidence)
    return features_of(encoded, n=n, by=by, contexts=contexts, least=least, samples=samples, seed=seed)


def features_of(
    encoded: EncodedEvidence,
    *,
    n: int = 10,
    by: By = "focus",
    contexts: int = 8,
    least: int = 10,
    samples: int = 2,
    seed: int = 0,
) -> Features:
    """Choose the `n` clearest (most frequent, largest) latents, with their largest activations.

    Args:
        encoded: a dictionary on evidence with token ids.
        n: how many latents.
        by: focus, frequency, or size (mean where active).
        contexts: how many of the largest activations of each.
        least: latents that fire on fewer tokens than this are left out.
        samples: draws of the null of `focus`.
        seed: of the null.

    Raises:
        Refused: the evidence has no token ids, or no latent fires often enough.
    """
    ids = encoded.evidence.ids
    if ids is None:
        raise Refused("features without tokens", "the evidence has no token ids", "gather it from a stream of a model")
    ids, code = ids.cpu(), encoded.code.csr()
    fires = code.fires()
    total = torch.zeros(code.n_latents).index_add_(0, code.index, code.value.float().abs())
    mean = total / fires
    often = fires >= least
    if not bool(often.any()):
        why = f"none does on {len(ids)}"
        raise Refused(f"latents that fire on {least} tokens", why, Code("give more tokens, or least=1"))
    focus = concentration(code, ids)
    key = {"focus": focus, "frequency": fires.float(), "size": mean}[by]
    chosen = torch.where(often, key, -torch.inf).topk(min(n, int(often.sum()))).indices
    g = control_generator(seed)
    null = [concentration(code, ids[torch.randperm(len(ids), generator=g)])[chosen] for _ in range(samples)]
    top, token = _largest(code, chosen, contexts)
    return Features(
        focus=focus[chosen],
        focus_null=torch.stack(null, -1),
        frequency=fires[chosen] / len(ids),
        mean_active=mean[chosen],
        largest=top,
        token=token,
        latent=chosen,
        ids=torch.where(token >= 0, ids[token.clamp(min=0)], -1),
        labels={"chosen": [f"latent {i}" for i in chosen.tolist()]},
        units={
            "focus": "share of activation",
            "focus_null": "share of activation",
            "frequency": "probability",
            "mean_active": "activation",
            "largest": "activation",
        },
        reasons={"focus": "the null tells what a latent that knows no token would show"},
        record={
            "dictionary": encoded.dictionary.fingerprint(),
            "tokens": len(ids),
            "by": by,
            "least": least,
            "versions": versions(),
            "machine": machine(),
        },
    )


def concentration(code: SparseCode, ids: Int[Tensor, "token"]) -> Float[Tensor, "latent"]:
    """Return the share of each latent's |activation| on the token id that has most of it; 0 for a dead latent."""
    code = code.csr()
    value = code.value.float().abs()
    cell = code.index * (int(ids.max()) + 1) + ids[code.tokens]
    which, place = cell.unique(return_inverse=True)
    sums = torch.zeros(len(which)).index_add_(0, place, value)
    most = torch.zeros(code.n_latents).scatter_reduce_(0, which // (int(ids.max()) + 1), sums, "amax")
    total = torch.zeros(code.n_latents).index_add_(0, code.index, value)
    return torch.where(total > 0, most / total, 0)


@dataclass(frozen=True)
class Passage:
    """The running text around one token.

    `ids` are the tokens in their order, −1 where one is not known (evidence leaves special tokens and sinks out); `at`
    is the place of the token among them; `before` and `after` are True if the text goes on there.
    """

    ids: tuple[int, ...]
    at: int
    before: bool
    after: bool

    def texts(self, model: Model) -> tuple[str, str, str]:
        """Return the text before the token, the token, and the text after it; cuts and unknown tokens are "…"."""
        parts: list[str] = []
        for known, run in groupby(self.ids, lambda i: i >= 0):
            ids = list(run)
            parts += model.text.token_texts(ids, running=True) if known else [CUT] * len(ids)
        before, after = "".join(parts[: self.at]), "".join(parts[self.at + 1 :])
        return CUT * self.before + before, parts[self.at], after + CUT * self.after


def context(
    encoded: EncodedEvidence, token: int, width: int = 8, texts: Mapping[int, Int[Tensor, "position"]] | None = None
) -> Passage:
    """Return the text around one token of the evidence: up to `width` tokens on either side, of its own context.

    Args:
        encoded: a dictionary on evidence with ids, sequence and position.
        token: number of the token in the evidence.
        width: tokens on either side.
        texts: the ids of whole contexts by number (`Reader.texts` of the stream): tokens that the evidence leaves out
            are then part of the text.

    Raises:
        Refused: the evidence does not know the order of tokens.
    """
    e = encoded.evidence
    if e.ids is None or e.sequence is None or e.position is None:
        raise Refused(
            "the context of a token", "ids, sequence and position are not all known", "use an unshuffled stream"
        )
    here = int(e.position[token])
    first = max(0, here - width)
    if texts is not None and e.context is not None:
        whole = texts[int(e.context[token])]
        some = whole[first : here + width + 1].tolist()
        return Passage(tuple(some), here - first, first > 0, here + width + 1 < len(whole))
    same = e.sequence == e.sequence[token]
    same &= same if e.context is None else e.context == e.context[token]
    rows = same.nonzero().squeeze(1)
    places = e.position[rows]
    if len(places.unique()) < len(rows):
        why = "its sequence has several tokens at one position"
        raise Refused("the context of a token", why, "give the evidence the number of each token's context")
    last = min(int(places.max()), here + width)
    ids = torch.full((last - first + 1,), -1)
    near = (places >= first) & (places <= last)
    ids[places[near].cpu() - first] = e.ids[rows[near]].cpu().long()
    return Passage(tuple(ids.tolist()), here - first, first > 0, bool((places > last).any()))


def _largest(code: SparseCode, chosen: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    top = torch.full((len(chosen), ranks), torch.nan)
    token = torch.full((len(chosen), ranks), -1)
    picked = code.select(chosen)
    where, latent, value = picked.tokens, picked.index, picked.value.float()
    for row in range(len(chosen)):
        own = (latent == row).nonzero().squeeze(1)
        best = value[own].abs().topk(min(ranks, len(own))).indices
        top[row, : len(best)], token[row, : len(best)] = value[own[best]], where[own[best]]
    return top, token
