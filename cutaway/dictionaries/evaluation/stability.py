"""Are the latents of two dictionaries the same?

* seeds: PW-MCC, the mean |cosine| of the best one-to-one matching between the decoders of two dictionaries that differ
  in their seed (Song et al. 2025, arXiv:2505.20254), for every pair.
* two dictionaries: the matching, how alike matched latents fire, and what only one of them has.
* widths: which latents of a wider dictionary a latent of a narrower one has split into.

The null of a matching is the same matching with random rows: with many latents in few dimensions it is far from 0.

Control: random rows in the place of the other dictionary's, and its firing on tokens in random order. Cost: no forward;
both dictionaries are run over the evidence once, and matched 1 + samples times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.method import method
from cutaway.core.record import machine, versions
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.evidence import Evidence, Seen, observe
from cutaway.dictionaries.evaluation.geometry import cosines, decoder_rows
from cutaway.dictionaries.evaluation.matching import matched, mcc
from cutaway.dictionaries.evaluation.scores import control_generator

_PAIRS = 1 << 16
_EACH_LATENT = "one value per latent; the null beside it says what chance gives"


@dataclass(frozen=True, kw_only=True)
class Stability(Result, kind="dictionary_stability"):
    """PW-MCC of every pair of dictionaries; 1 on the diagonal."""

    alike: Float[Tensor, "seed other"]
    alike_interval: Float[Tensor, "seed other bound"]
    alike_null: Float[Tensor, "seed other sample"]


def stability(dictionaries: Sequence[Dictionary], *, samples: int = 2, seed: int = 0) -> Stability:
    """Compare dictionaries trained with several seeds, pair by pair.

    Intervals: over matched pairs of latents. Null: each with random rows in the place of the other's.

    Raises:
        Refused: fewer than two dictionaries, or ones that write other widths.
    """
    if len(dictionaries) < 2:
        raise Refused(f"stability of {len(dictionaries)} dictionaries", "there is no pair", "give two or more")
    rows = [decoder_rows(d).cpu() for d in dictionaries]
    _same_width(rows)
    n, g = len(rows), control_generator(seed)
    value, interval, null = torch.ones(n, n), torch.ones(n, n, 2), torch.ones(n, n, samples)
    for i in range(n):
        for j in range(i):
            near = matched(rows[i], rows[j])[2]
            value[i, j] = value[j, i] = near.mean()
            interval[i, j] = interval[j, i] = mean_interval(near, within=(0.0, 1.0))
            null[i, j] = null[j, i] = torch.tensor(
                [mcc(rows[i], torch.randn(rows[j].shape, generator=g)) for _ in range(samples)]
            )
    names = [str(d.about.get("seed", k)) for k, d in enumerate(dictionaries)]
    return Stability(
        alike=value,
        alike_interval=interval,
        alike_null=null,
        labels={"seed": names, "other": names, "bound": BOUNDS},
        units={"alike": "cosine", "alike_interval": "cosine", "alike_null": "cosine"},
        record=_record([d.fingerprint() for d in dictionaries], "over matched pairs of latents"),
    )


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
    return comparison(observe(dictionary, evidence), observe(second, evidence), samples=samples, seed=seed)


def comparison(a: Seen, b: Seen, *, samples: int = 2, seed: int = 0) -> Comparison:
    """Match the latents of two dictionaries one to one by direction, and see whether partners fire together.

    Raises:
        Refused: evidence of other tokens, or decoders of other widths.
    """
    if len(a.evidence) != len(b.evidence):
        raise Refused("two dictionaries on other tokens", "firing cannot be compared", "observe both on one evidence")
    one, two = decoder_rows(a.dictionary).cpu(), decoder_rows(b.dictionary).cpu()
    _same_width([one, two])
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
        reasons=dict.fromkeys(("cosine", "overlap"), _EACH_LATENT),
        record=_record([a.dictionary.fingerprint(), b.dictionary.fingerprint()], None)
        | {"left over": {"first": int((partner < 0).sum()), "second": len(two) - len(j)}},
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


def splitting(
    narrow: Seen, wide: Seen, *, within: float = 0.8, alike: float = 0.3, samples: int = 2, seed: int = 0
) -> Splitting:
    """Find the latents of a wider dictionary that a latent of a narrower one has split into (Bricken et al. 2023).

    A latent of the wider one is a part if, of its tokens, a share of `within` or more has the narrow latent active, and
    its decoder row has a cosine of `alike` or more.

    Raises:
        Refused: evidence of other tokens, or decoders of other widths.
    """
    if len(narrow.evidence) != len(wide.evidence):
        raise Refused("two dictionaries on other tokens", "firing cannot be compared", "observe both on one evidence")
    small, large = decoder_rows(narrow.dictionary).cpu(), decoder_rows(wide.dictionary).cpu()
    _same_width([small, large])
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
        reasons=dict.fromkeys(("parts", "covered", "nearest"), _EACH_LATENT),
        record=_record([narrow.dictionary.fingerprint(), wide.dictionary.fingerprint()], None)
        | {"within": within, "alike": alike},
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


def _same_width(rows: Sequence[Tensor]) -> None:
    if len({r.shape[1] for r in rows}) > 1:
        raise Refused(f"decoders of widths {[r.shape[1] for r in rows]}", "they cannot be compared", "use one site")


def _record(fingerprints: list[str], interval: str | None) -> dict[str, Any]:
    note = {"interval": interval} if interval else {}
    return {"dictionaries": fingerprints, "versions": versions(), "machine": machine(), **note}
