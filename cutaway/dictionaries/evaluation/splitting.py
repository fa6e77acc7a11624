"""Has a latent split into several in a wider dictionary?

A latent of the wider dictionary is a part of a latent of the narrower one (Bricken et al. 2023, Towards
Monosemanticity) if, of its tokens, a share of `within` or more has the narrow latent active, and its decoder row has a
cosine of `alike` or more with that of the narrow latent.

Control: the wider dictionary's firing on tokens in random order, and random rows in the place of its own. Cost: no
forward; both dictionaries are run over the evidence once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.method import method
from cutaway.core.record import machine, versions
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.compare import EACH_LATENT
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence, encode_evidence, same_tokens
from cutaway.dictionaries.evaluation.geometry import cosines, decoder_rows
from cutaway.dictionaries.evaluation.matching import same_width
from cutaway.dictionaries.evaluation.scores import control_generator

_PAIRS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Splitting(Result, kind="dictionary_splitting"):
    """Parts of each latent of a narrow dictionary in a wider one.

    `parts`: latents of the wider one that fire nearly only where it fires and point its way. `covered`: share of its
    tokens on which one of its parts fires; `covered_null`: the same with the wider code's tokens shuffled.
    `nearest`: cosine with the nearest latent of the wider one.
    """

    parts: Float[Tensor, "latent"]
    covered: Float[Tensor, "latent"]
    covered_null: Float[Tensor, "latent sample"]
    nearest: Float[Tensor, "latent"]
    nearest_null: Float[Tensor, "latent sample"]


@method(
    answers="Has a latent split into several in a wider dictionary?",
    paper="Bricken et al. 2023, Towards Monosemanticity",
    cost="0",
    control="shuffled_tokens",
    rung="observational",
)
def splitting(
    dictionary: Dictionary,
    second: Dictionary,
    evidence: Evidence,
    /,
    *,
    within: float = 0.8,
    alike: float = 0.3,
    samples: int = 2,
    seed: int = 0,
) -> Splitting:
    """Find the latents of a second, wider dictionary that each latent has split into.

    Args:
        within: least share of a part's tokens on which the latent is active.
        alike: least cosine of the decoder rows of a part and the latent.
        samples: number of random orders of tokens, and of draws of random rows.
        seed: seed of the null.

    Raises:
        Refused: the second dictionary is the narrower one, or of another width; or evidence of other sites.
    """
    if second.n_latents < dictionary.n_latents:
        sizes = f"it has {dictionary.n_latents} latents, and the second one {second.n_latents}"
        raise Refused(f"splitting of {dictionary!r}", sizes, "give the narrower dictionary first")
    narrow, wide = encode_evidence(dictionary, evidence), encode_evidence(second, evidence)
    return splitting_of(narrow, wide, within=within, alike=alike, samples=samples, seed=seed)


def splitting_of(
    narrow: EncodedEvidence,
    wide: EncodedEvidence,
    *,
    within: float = 0.8,
    alike: float = 0.3,
    samples: int = 2,
    seed: int = 0,
) -> Splitting:
    """Find the latents of a wider dictionary that each latent of a narrower one has split into.

    Raises:
        Refused: evidence of other tokens, or decoders of other widths.
    """
    same_tokens(narrow, wide)
    small, large = decoder_rows(narrow.dictionary).cpu(), decoder_rows(wide.dictionary).cpu()
    same_width([small, large])
    g = control_generator(seed)
    a, b = narrow.code.csr(), wide.code.csr()
    part, covered = _parts(a, b, small, large, within, alike)
    null, strangers = [], []
    for _ in range(samples):
        null.append(_parts(a, b.rows(torch.randperm(len(b), generator=g)), small, large, within, alike)[1])
        strangers.append(_nearest(small, torch.randn(large.shape, generator=g)))
    return Splitting(
        parts=part,
        covered=covered,
        covered_null=torch.stack(null, -1),
        nearest=_nearest(small, large),
        nearest_null=torch.stack(strangers, -1),
        units={
            "parts": "latents",
            "covered": "share of tokens",
            "covered_null": "share of tokens",
            "nearest": "cosine",
            "nearest_null": "cosine",
        },
        reasons=dict.fromkeys(("parts", "covered", "nearest"), EACH_LATENT),
        record={
            "dictionaries": [narrow.dictionary.fingerprint(), wide.dictionary.fingerprint()],
            "within": within,
            "alike": alike,
            "versions": versions(),
            "machine": machine(),
        },
    )


def _parts(
    a: SparseCode, b: SparseCode, small: Tensor, large: Tensor, within: float, alike: float
) -> tuple[Float[Tensor, "latent"], Float[Tensor, "latent"]]:
    """Count the parts of each latent of `a` in `b`, and the share of its tokens on which one of them fires."""
    from scipy.sparse import csr_matrix

    one, two = _matrix(a), _matrix(b)
    both = (one.T @ two).tocoo()  # only pairs that fire together somewhere can be a latent and its part
    i, j, n = (torch.from_numpy(t.copy()).long() for t in (both.row, both.col, both.data))
    kept = n >= within * b.fires()[j]
    i, j = i[kept], j[kept]
    cosine = torch.cat(
        [
            (normalize(small[x], dim=-1) * normalize(large[y], dim=-1)).sum(1)
            for x, y in zip(i.split(_PAIRS), j.split(_PAIRS), strict=True)
        ]
    )
    i, j = i[cosine >= alike], j[cosine >= alike]
    of = csr_matrix(([1.0] * len(i), (j.numpy(), i.numpy())), shape=(b.n_latents, a.n_latents))
    reached = one.multiply((two @ of) > 0)  # where a latent of `a` fires together with one of its parts
    covered = torch.as_tensor(reached.sum(0)).double().reshape(-1) / a.fires()
    return torch.bincount(i, minlength=a.n_latents).float(), covered.float()


def _nearest(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n"]:
    """Find the largest cosine of each row of `a` with a row of `b`, a few rows at a time."""
    return torch.cat([cosines(rows, b).max(1).values for rows in a.split(1024)])


def _matrix(code: SparseCode) -> Any:
    """Return where a code is active, as a scipy matrix."""
    from scipy.sparse import csr_matrix

    code = code.csr()
    assert code.indptr is not None
    ones = torch.ones(len(code.index), dtype=torch.double).numpy()
    return csr_matrix((ones, code.index.numpy(), code.indptr.numpy()), shape=(len(code), code.n_latents))
