"""Do latents fall silent on some tokens that show their concept, because others carry it there?

Absorption (Chanin et al. 2024, arXiv:2409.14507; measured as in SAEBench, arXiv:2503.09532). With w the unit direction
of a probe of the concept, x·w the probe's reading of a token that shows the concept, and f_i (W_d,i·w) what latent i
puts into it:

* the concept's latents are found by k-sparse probing: the best latent, then more while F1 rises by more than 0.03;
* full: all of them are silent, the latent that puts in most has cos(W_d, w) ≥ 0.025 and at least 0.4 of the reading;
* fraction: of the part that the concept's latents leave open, what up to three others with cos ≥ 0.1 put in, where
  those put in at least 0.4 of the reading: min(others, left) / (min(others, left) + own).

Where the truth is planted, the probe is the true direction, the tokens that show a concept are known, and its own
latent is the one whose firing has the best F1 (a child that fires often would pass for a split-off latent of its
parent). Features that have children are concepts; those without are the control. `letters` has the first-letter task of
the paper, for any model and list of words. Null: random dictionaries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.refuse import Refused
from cutaway.dictionaries.benchmarks.generative import Law
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence
from cutaway.dictionaries.evaluation.geometry import decoder_rows
from cutaway.dictionaries.evaluation.reconstruction import over_units
from cutaway.dictionaries.evaluation.scores import Score, Scores, collect, control_generator
from cutaway.interventions.probes import logistic

FULL_COSINE, PART_COSINE, SHARE, MOST = 0.025, 0.1, 0.4, 3
CANDIDATES, MOST_SPLIT, RISE = 64, 10, 0.03
_TOKENS = 4000  # tokens that a concept's latents are searched on
_FEW = 50  # concepts with fewer tokens are left out


@dataclass(frozen=True)
class Absorbed:
    """Absorption of one concept on the tokens that show it."""

    full: Bool[Tensor, "token"]
    fraction: Float[Tensor, "token"]
    latents: Int[Tensor, "own"]


def absorbed(
    code: SparseCode,
    rows: Float[Tensor, "latent d"],
    x: Float[Tensor, "token d"],
    probe: Float[Tensor, "d"],
    own: Int[Tensor, "own"],
) -> Absorbed:
    """Measure full absorption and its fraction on tokens that show a concept, given its probe and its own latents.

    A token on which the probe reads nothing (x·w ≤ 0) shows no absorption.
    """
    w = normalize(probe.float(), dim=0)
    put = rows.float() @ w
    cosine = normalize(rows.float(), dim=-1) @ w
    reading = x.float() @ w
    code = code.csr()
    given = code.value.float() * put[code.index]
    mine = torch.isin(code.index, own)
    silent = torch.bincount(code.tokens[mine], minlength=len(code)) == 0
    by_own = torch.zeros(len(code)).index_add_(0, code.tokens[mine], given[mine])
    top, place = _largest(given, code, 1)
    first = torch.where(place[:, 0] >= 0, cosine[code.index[place[:, 0].clamp(min=0)]], -1.0)
    full = silent & (reading > 0) & (first >= FULL_COSINE) & (top[:, 0] >= SHARE * reading)
    other = ~mine & (cosine[code.index] >= PART_COSINE) & (given > 0)
    by_others = _largest(torch.where(other, given, 0.0), code, MOST)[0].sum(1)
    left = (reading - by_own).clamp(min=0)
    taken = torch.minimum(by_others, left)
    part = torch.where(by_own <= 0, 1.0, taken / (taken + by_own).clamp(min=1e-12))
    counts = (reading > 0) & (by_own < reading) & (by_others >= SHARE * reading)
    return Absorbed(full, torch.where(counts, part, 0.0), own)


def own_latents(code: SparseCode, shows: Bool[Tensor, "token"], *, seed: int = 0) -> Int[Tensor, "own"]:
    """Find the latents of a concept: the best, then the next while a probe's F1 rises by more than 0.03; at most 10.

    Candidates are the 64 whose means differ most between tokens with and without the concept; their order is that of
    the weights of an L1 probe on latents scaled to their largest value. F1 is that on as many tokens without the
    concept as with it.
    """
    rows = _balanced(shows, control_generator(seed))
    y, part = shows[rows], code.rows(rows)
    x = part.columns(_candidates(part, y))
    which = _candidates(part, y)
    order = _l1_order(x / x.abs().amax(0).clamp(min=1e-12), y)
    kept, best = 1, _f1(logistic(x[:, order[:1]], y), x[:, order[:1]], y)
    for k in range(2, min(MOST_SPLIT, len(order)) + 1):
        f1 = _f1(logistic(x[:, order[:k]], y), x[:, order[:k]], y)
        if f1 - best <= RISE:
            break
        kept, best = k, f1
    return which[order[:kept]]


def best_latent(code: SparseCode, shows: Bool[Tensor, "token"]) -> Int[Tensor, "1"]:
    """Find the latent whose firing detects a concept with the best F1."""
    fires, hits = code.fires(), code.rows(shows).fires()
    return (2 * hits / (fires + shows.sum())).argmax().reshape(1)


def planted_absorption(
    encoded: EncodedEvidence,
    directions: Float[Tensor, "feature d"],
    law: Law,
    *,
    null: Sequence[EncodedEvidence] = (),
    most: int = 64,
    seed: int = 0,
) -> Scores:
    """Measure absorption of true features that have children, beside features without and random dictionaries.

    Args:
        encoded: a dictionary on evidence with a true code.
        directions: the true directions.
        law: the law of the truth, whose forest says which features have children.
        null: random dictionaries on the same evidence.
        most: features judged of each kind, the most frequent ones.
        seed: of the search for latents.

    Raises:
        Refused: no true code, or no feature with children that is frequent enough.
    """
    parents, childless = _concepts(encoded, law, most)
    rows = _planted(encoded, directions, parents, seed)
    random = [_planted(s, directions, parents, seed) for s in null]
    others = {"features without children": _planted(encoded, directions, childless, seed)} if childless else {}
    rows = [s.against([r[i] for r in random], {n: o[i] for n, o in others.items()}) for i, s in enumerate(rows)]
    record = {
        "tokens": len(encoded.evidence),
        "concepts": len(parents),
        "without children": len(childless),
        "interval": "over features",
        "dictionary": encoded.dictionary.fingerprint(),
    }
    return collect(rows, record)


def summary(found: Sequence[Absorbed], unit: str = "concept") -> list[Score]:
    """Average the rate of full absorption, its fraction and the number of own latents over concepts."""
    return [
        over_units(
            "full absorption", torch.stack([a.full.double().mean() for a in found]), "share of tokens", (0.0, 1.0)
        ),
        over_units("absorption fraction", torch.stack([a.fraction.double().mean() for a in found]), "", (0.0, 1.0)),
        over_units(
            "own latents", torch.tensor([float(len(a.latents)) for a in found]), f"latents a {unit}", (0.0, math.inf)
        ),
    ]


def _planted(encoded: EncodedEvidence, directions: Tensor, concepts: Sequence[int], seed: int) -> list[Score]:
    truth, site = encoded.evidence.truth, encoded.dictionary.writes[0]
    assert truth is not None
    rows, x = decoder_rows(encoded.dictionary).cpu(), encoded.evidence.of(site).cpu()
    origin = x.double().mean(0) - truth.times(directions).double().mean(0)
    code, found = encoded.code.csr(), []
    for feature in concepts:
        shows = truth.columns([feature])[:, 0] > 0
        chosen = shows.nonzero().squeeze(1)
        on = absorbed(
            code.rows(chosen), rows, x[chosen] - origin.float(), directions[feature], best_latent(code, shows)
        )
        found.append(replace(on, latents=own_latents(code, shows, seed=seed)))
    return summary(found, "feature")


def _concepts(encoded: EncodedEvidence, law: Law, most: int) -> tuple[list[int], list[int]]:
    truth = encoded.evidence.truth
    if truth is None:
        raise Refused("planted absorption", "the evidence has no true code", "gather it from a Truth")
    fires = truth.fires()
    often = (fires >= _FEW) & (len(truth) - fires >= _FEW)
    has = torch.bincount(law.parent[law.parent >= 0], minlength=len(law)) > 0
    rank = fires.argsort(descending=True, stable=True)
    parents = [i for i in rank.tolist() if often[i] and has[i]][:most]
    childless = [i for i in rank.tolist() if often[i] and not has[i]][:most]
    if not parents:
        raise Refused("planted absorption", f"no feature with children fires {_FEW} times", "give more tokens")
    return parents, childless


def _largest(given: Tensor, code: SparseCode, k: int) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """Return the k largest entries of each token and their places; 0 and −1 where a token has fewer."""
    order = given.argsort(descending=True, stable=True)
    order = order[code.tokens[order].argsort(stable=True)]
    token = code.tokens[order]
    starts = torch.searchsorted(token, torch.arange(len(code)))
    rank = torch.arange(len(order)) - starts[token]
    value, place = torch.zeros(len(code), k), torch.full((len(code), k), -1)
    kept = rank < k
    value[token[kept], rank[kept]], place[token[kept], rank[kept]] = given[order[kept]], order[kept]
    return value, place


def _candidates(code: SparseCode, y: Tensor) -> Int[Tensor, "candidate"]:
    sums = [
        torch.zeros(code.n_latents).index_add_(0, part.index.reshape(-1), part.value.reshape(-1).float()) / n
        for part, n in ((code.rows(y), int(y.sum())), (code.rows(~y), int((~y).sum())))
    ]
    return (sums[0] - sums[1]).abs().topk(min(CANDIDATES, code.n_latents)).indices


def _l1_order(x: Tensor, y: Tensor) -> Int[Tensor, "candidate"]:
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(l1_ratio=1.0, C=1 / (0.01 * len(y)), solver="liblinear", max_iter=200, random_state=0)
    weight = torch.from_numpy(probe.fit(x.double().numpy(), y.numpy()).coef_[0])
    return weight.argsort(descending=True, stable=True)


def _f1(probe: object, x: Tensor, y: Tensor) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(y.numpy(), probe.predict(x.double().numpy())))  # type: ignore[attr-defined]


def _balanced(shows: Tensor, g: torch.Generator) -> Int[Tensor, "token"]:
    """Draw as many tokens without the concept as with it, at most 4,000 in all."""
    yes, no = shows.nonzero().squeeze(1), (~shows).nonzero().squeeze(1)
    n = min(len(yes), len(no), _TOKENS // 2)
    pick = [part[torch.randperm(len(part), generator=g)[:n]] for part in (yes, no)]
    return torch.cat(pick).sort().values


def by_concept(found: Mapping[str, Absorbed]) -> dict[str, dict[str, float]]:
    """Return the absorption of every concept by name, ready for JSON."""
    return {
        n: {"full": float(a.full.double().mean()), "fraction": float(a.fraction.double().mean()), "tokens": len(a.full)}
        for n, a in found.items()
    }
