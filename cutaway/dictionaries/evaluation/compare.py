"""Are the latents of two dictionaries the same?

Latents are matched one to one so that the sum of |cosines| of their decoder rows is largest (Song et al. 2025,
arXiv:2505.20254). Then: how alike matched latents fire, and what only one of the dictionaries has. With many latents in
few dimensions the matching of random rows is far from 0.

Control: random rows in the place of the other dictionary's, and its firing on tokens in random order. Cost: no forward;
both dictionaries are run over the evidence once, and matched 1 + samples times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.record import machine, versions
from cutaway.core.result import Result
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence, encode_evidence, same_tokens
from cutaway.dictionaries.evaluation.geometry import decoder_rows
from cutaway.dictionaries.evaluation.matching import matched, same_width
from cutaway.dictionaries.evaluation.scores import control_generator

EACH_LATENT = "one value per latent; the null beside it says what chance gives"


@dataclass(frozen=True, kw_only=True)
class Comparison(Result, kind="dictionary_comparison"):
    """Latents of one dictionary beside their partners in another.

    `cosine` of decoder rows, and `overlap` of firing (tokens on which both fire / on which either does), NaN where
    neither fires. `partner` is −1 for a latent left over. `overlap_null`: the partner's tokens shuffled.
    """

    cosine: Float[Tensor, "latent"]
    cosine_null: Float[Tensor, "latent sample"]
    overlap: Float[Tensor, "latent"]
    overlap_null: Float[Tensor, "latent sample"]
    partner: Int[Tensor, "latent"]


@method(
    answers="Are the latents of two dictionaries the same?",
    paper="Song et al. 2025, arXiv:2505.20254",
    cost="0",
    control="random_rows",
    rung="observational",
)
def compare(
    dictionary: Dictionary, second: Dictionary, evidence: Evidence, /, *, samples: int = 2, seed: int = 0
) -> Comparison:
    """Match the latents of two dictionaries one to one by direction, and see whether partners fire together.

    Args:
        samples: number of draws of random rows, and of random orders of tokens.
        seed: seed of the draws.

    Raises:
        Refused: evidence of other sites, or decoders of other widths.
    """
    return comparison(
        encode_evidence(dictionary, evidence), encode_evidence(second, evidence), samples=samples, seed=seed
    )


def comparison(a: EncodedEvidence, b: EncodedEvidence, *, samples: int = 2, seed: int = 0) -> Comparison:
    """Match the latents of two dictionaries one to one by direction, and see whether partners fire together.

    Raises:
        Refused: evidence of other tokens, or decoders of other widths.
    """
    same_tokens(a, b)
    one, two = decoder_rows(a.dictionary).cpu(), decoder_rows(b.dictionary).cpu()
    same_width([one, two])
    i, j, near = matched(one, two)
    n, g = len(one), control_generator(seed)
    partner, cosine = torch.full((n,), -1), torch.full((n,), torch.nan)
    partner[i], cosine[i] = j, near
    null = torch.full((n, samples), torch.nan)
    shuffled = torch.full((n, samples), torch.nan)
    for s in range(samples):
        x, _, other = matched(one, torch.randn(two.shape, generator=g))
        null[x, s] = other
        order = torch.randperm(len(a.evidence), generator=g)
        shuffled[:, s] = overlap(a.code, b.code.rows(order), partner)
    return Comparison(
        cosine=cosine,
        cosine_null=null,
        overlap=overlap(a.code, b.code, partner),
        overlap_null=shuffled,
        partner=partner,
        units={
            "cosine": "cosine",
            "cosine_null": "cosine",
            "overlap": "share of tokens",
            "partner": "latent",
            "overlap_null": "share of tokens",
        },
        reasons=dict.fromkeys(("cosine", "overlap"), EACH_LATENT),
        record={
            "dictionaries": [a.dictionary.fingerprint(), b.dictionary.fingerprint()],
            "left over": {"first": int((partner < 0).sum()), "second": len(two) - len(j)},
            "versions": versions(),
            "machine": machine(),
        },
    )


def overlap(a: SparseCode, b: SparseCode, partner: Int[Tensor, "latent"]) -> Float[Tensor, "latent"]:
    """Divide the tokens on which a latent and its partner both fire by those on which either does; NaN where none."""
    a, b = a.csr(), b.csr()
    there = b.tokens * b.n_latents + b.index
    mate = partner[a.index]
    wanted = a.tokens * b.n_latents + mate
    hit = torch.isin(wanted, there) & (mate >= 0)
    both = torch.bincount(a.index[hit], minlength=a.n_latents).double()
    either = a.fires() + b.fires()[partner.clamp(min=0)] - both
    return torch.where((partner >= 0) & (either > 0), both / either, torch.nan).float()
