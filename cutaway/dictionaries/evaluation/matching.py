"""Which true features has a dictionary found?

Directions first, with c the cosines of decoder rows and true directions:

* MMCS: mean over true features of max |c| (Sharkey et al. 2022). Duplicated latents do not lower it, but they lower
* uniqueness: number of different features that are some latent's best match, per latent;
* MCC: mean |c| over the one-to-one matching that makes it largest (Hungarian method; arXiv:2505.20254).

Then firing: each latent is a detector of its best-matching feature. precision, recall and F1 are means over latents,
0 where a latent never fires (as in SynthSAEBench, arXiv:2602.14687). Intervals: over latents or features
for what depends on weights only, over groups of tokens for firing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence
from cutaway.dictionaries.evaluation.geometry import cosines, decoder_rows
from cutaway.dictionaries.evaluation.reconstruction import over_units
from cutaway.dictionaries.evaluation.scores import NO_INTERVAL, Score, Scores, collect

_SAMPLES = 300


def mmcs(truth: Float[Tensor, "feature d"], rows: Float[Tensor, "latent d"]) -> float:
    """Average the largest |cosine| of each true feature with a latent."""
    return float(cosines(truth, rows).abs().max(1).values.mean())


def uniqueness(truth: Float[Tensor, "feature d"], rows: Float[Tensor, "latent d"]) -> float:
    """Count the different best-matching features, per latent."""
    return len(cosines(rows, truth).abs().argmax(1).unique()) / len(rows)


def mcc(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Average the |cosine| of the best one-to-one matching of rows; the smaller set is matched whole."""
    return float(matched(a, b)[2].mean())


def matched(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]
) -> tuple[Int[Tensor, "pair"], Int[Tensor, "pair"], Float[Tensor, "pair"]]:
    """Find the one-to-one matching with the largest sum of |cosines|: rows of a, rows of b, and the |cosines|."""
    from scipy.optimize import linear_sum_assignment

    near = cosines(a, b).abs().cpu()
    first, second = linear_sum_assignment(near.numpy(), maximize=True)
    i, j = torch.from_numpy(first), torch.from_numpy(second)
    return i, j, near[i, j]


def same_width(rows: Sequence[Float[Tensor, "latent _"]]) -> None:
    """Refuse decoder rows of different widths, which have no cosines.

    Raises:
        Refused: the widths differ.
    """
    if len({r.shape[1] for r in rows}) > 1:
        raise Refused(f"decoders of widths {[r.shape[1] for r in rows]}", "they cannot be compared", "use one site")


def counts(
    code: SparseCode, truth: SparseCode, match: Int[Tensor, "latent"], groups: Int[Tensor, "token"]
) -> tuple[Float[Tensor, "group latent"], Float[Tensor, "group latent"], Float[Tensor, "group latent"]]:
    """Count hits, firings of the latent and firings of its feature, by group of tokens."""
    code, truth = code.csr(), truth.csr()
    n, shape = truth.n_latents, (int(groups.max()) + 1, code.n_latents)
    there = truth.tokens * n + truth.index  # ascending, as csr is
    wanted = code.tokens * n + match[code.index]
    place = torch.searchsorted(there, wanted).clamp(max=max(len(there) - 1, 0))
    hit = there[place] == wanted if len(there) else torch.zeros(len(wanted), dtype=torch.bool)
    cell = groups[code.tokens] * code.n_latents + code.index
    fires = torch.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape).float()
    hits = torch.bincount(cell[hit], minlength=shape[0] * shape[1]).reshape(shape).float()
    cell = groups[truth.tokens] * n + truth.index
    true = torch.bincount(cell, minlength=shape[0] * n).reshape(shape[0], n).float()
    return hits, fires, true[:, match]


def rates(hits: Tensor, fires: Tensor, true: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute precision, recall and F1 from counts; 0 where they are not defined."""
    precision, recall = (torch.where(n > 0, hits / n, 0) for n in (fires, true))
    return precision, recall, torch.where(hits > 0, 2 * hits / (fires + true), 0)


def recovery(
    encoded: EncodedEvidence,
    truth: Float[Tensor, "feature d"],
    *,
    null: Sequence[EncodedEvidence] = (),
    control: Mapping[str, EncodedEvidence] | None = None,
    seed: int = 0,
) -> Scores:
    """Measure how well the latents of a dictionary are the true features, beside random dictionaries and controls.

    Args:
        encoded: the dictionary on evidence with a true code.
        truth: the true directions.
        null: random dictionaries on the same evidence.
        control: other dictionaries by name.
        seed: of the resampled groups behind precision, recall and F1.

    Raises:
        Refused: the evidence has no true code, or the directions have another width.
    """
    rows = recovery_scores(encoded, truth, seed)
    random = [recovery_scores(s, truth, seed) for s in null]
    others = {n: recovery_scores(s, truth, seed) for n, s in (control or {}).items()}
    rows = [s.against([r[i] for r in random], {n: o[i] for n, o in others.items()}) for i, s in enumerate(rows)]
    how = {"MMCS": "over features", "MCC": "over matched pairs"}
    record = {
        "tokens": len(encoded.evidence),
        "dictionary": encoded.dictionary.fingerprint(),
        "interval": {**how, "F1": encoded.evidence.how},
    }
    return collect(rows, record, {"uniqueness": "a count of weights alone; see over_seeds"})


def recovery_scores(encoded: EncodedEvidence, truth: Float[Tensor, "feature d"], seed: int = 0) -> list[Score]:
    """Return the scores of this family without controls.

    Raises:
        Refused: the evidence has no true code, or the directions have another width.
    """
    code, rows = encoded.evidence.truth, decoder_rows(encoded.dictionary).cpu()
    if code is None:
        raise Refused("recovery of true features", "the evidence has no true code", "gather it from a Truth")
    if rows.shape[1] != truth.shape[1]:
        what = f"true directions of width {truth.shape[1]}"
        raise Refused(what, f"the decoder writes {rows.shape[1]}", "use the truth that made its activations")
    near = cosines(rows, truth).abs()
    match = near.argmax(1)
    groups = encoded.evidence.groups
    coarse = groups * 64 // (int(groups.max()) + 1)  # a group has its own row of counts for every latent
    found = counts(encoded.code, code, match, coarse)
    point = [float(r.mean()) for r in rates(*(c.sum(0) for c in found))]
    spread = _resampled(found, seed)
    firing = [
        Score(n, v, (float(low), float(high)))
        for n, v, (low, high) in zip(("precision", "recall", "F1"), point, spread, strict=True)
    ]
    return [
        over_units("MMCS", near.max(0).values, within=(0.0, 1.0)),
        over_units("MCC", matched(rows, truth)[2], within=(0.0, 1.0)),
        Score("uniqueness", len(match.unique()) / len(rows), NO_INTERVAL),
        *firing,
    ]


def _resampled(found: tuple[Tensor, Tensor, Tensor], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Bootstrap the intervals of mean precision, recall and F1 over groups."""
    n, g = len(found[0]), generator(seed)
    if n < 2:
        return [(torch.tensor(torch.nan), torch.tensor(torch.nan))] * 3
    draws = torch.randint(n, (_SAMPLES, n), generator=g)
    weights = torch.zeros(_SAMPLES, n).scatter_add_(1, draws, torch.ones(_SAMPLES, n))
    means = [r.mean(1) for r in rates(*(weights @ c for c in found))]
    tails = torch.tensor([0.025, 0.975])
    return [(q[0], q[1]) for q in (m.quantile(tails) for m in means)]
