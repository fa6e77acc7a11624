"""Which short rule says where a latent fires, and how true is it on documents that it was not found on?

A rule is code (`rules.families`): the token is one of some, what stands before it, a bigram, a suffix, a class of
letters, a repetition, a position, or a kind of document. It is found on the explain half of the store's documents
(`rules.mine`) and scored on every token of the score half, so its scores need no judge.

* `score[latent, measure]`: precision, recall, F1 and AUROC of firing or not, on the score half.
* `interval`: 95 %, bootstrap over documents.
* Control (`null`): rules for random features, each active on as many random tokens as the latent; found and scored in
  the same way.
* `chance`: F1 of a rule that fires on as many tokens of the score half, wherever the latent is active. F1 is not 0 by
  chance: at a density p, a rule that fires on a share q of the tokens has 2pq / (p + q).
* The label is the rule where the low end of its F1 is above the F1 of every random feature, above chance and above 0.2,
  else “no short rule”, with the best that there was.
* Known failures: rules know tokens, not meaning. A rare latent has few held-out tokens, and its interval says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.progress import advance
from cutaway.core.record import counting, machine, versions
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS
from cutaway.features.rules.families import Corpus
from cutaway.features.rules.mine import Miner, Rule, chance_f1, measures
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.latents import StoredLatents
from cutaway.features.store.meta import NONE, RULE, Label

MEASURES = ["precision", "recall", "F1", "AUROC"]
_UNITS = {"score": "share", "null": "share", "chance": "share", "found": "share", "held_out": "tokens"}
_REASONS = {
    "chance": "an expectation",
    "found": "it is of the half that the rule was chosen on",
    "held_out": "a count",
}
_LEAST = 0.2  # F1 below which no rule is claimed


@dataclass(frozen=True, kw_only=True)
class Explanations(Result, kind="feature_explanations"):
    """Rules of latents with their scores on held-out documents.

    Attributes:
        score: precision, recall, F1 and AUROC.
        interval: of `score`, 95 %, over documents.
        null: `score` of random features, 0 (AUROC ½) where no rule was found for one.
        chance: F1 of a rule that fires as often, by chance.
        found: F1 on the half that the rule was found on.
        held_out: tokens of the score half on which the latent is active.
    """

    score: Float[Tensor, "latent measure"]
    interval: Float[Tensor, "latent measure bound"]
    null: Float[Tensor, "latent measure sample"]
    chance: Float[Tensor, "latent"]
    found: Float[Tensor, "latent"]
    held_out: Float[Tensor, "latent"]


def explain(
    store: FeatureStore,
    latents: Sequence[int] = (),
    *,
    dictionary: str | None = None,
    write: bool = True,
    resamples: int = 200,
    samples: int = 2,
    seed: int = 0,
) -> Explanations:
    """Find and score rules, and write them as labels into the store.

    Args:
        store: the store, with codes.
        latents: these; all that are active on four tokens of the explain half if empty.
        dictionary: name of the dictionary, where there are several.
        write: False to leave the store as it is.
        resamples: number of resamples of the documents behind each interval.
        samples: number of random features for each latent.
        seed: of tokens that are drawn, random features and resamples.

    Raises:
        Refused: no such latent, or a store without codes in both halves.
    """
    if samples < 1:
        raise Refused(Keyword("samples", samples), "a rule stands beside its control", "use at least 1")
    known, g = store.latents(dictionary), np.random.default_rng(seed)
    miner = Miner(Corpus.of(store), g)
    if not len(miner.explain) or not len(miner.score):
        why = f"it has codes of {len(miner.explain)} tokens to explain and {len(miner.score)} to score on"
        raise Refused("rules from this store", why, "harvest more documents, with more of their codes")
    chosen, rows = list(latents) or _explained(known, miner), list[_Row]()
    with counting() as spent:
        for i, latent in enumerate(chosen):
            rows.append(_row(miner, known, latent, resamples, samples))
            advance(i + 1, len(chosen))
    if not rows:
        raise Refused("rules for latents", "none is active on four tokens of the explain half", "harvest more tokens")
    labels = [_label(miner.corpus, known.name, latent, row) for latent, row in zip(chosen, rows, strict=True)]
    if write:
        store.meta.put(labels)
    ruled = sum(x.text[: len(NONE)] != NONE for x in labels)
    texts = [f"{i}: {x.text}" for i, x in zip(chosen, labels, strict=True)]
    return Explanations(
        score=torch.stack([r.score for r in rows]),
        interval=torch.stack([r.interval for r in rows]),
        null=torch.stack([r.null for r in rows]),
        chance=torch.tensor([r.chance for r in rows]),
        found=torch.tensor([0.0 if r.rule is None else r.rule.f1 for r in rows]),
        held_out=torch.tensor([float(r.held_out) for r in rows]),
        labels={"latent": texts, "measure": MEASURES, "bound": BOUNDS},
        units=_UNITS,
        reasons=_REASONS,
        record={
            "method": "features.explain",
            "answers": "Which short rule says where a latent fires, on documents that it was not found on?",
            "control": "random_features",
            "subjects": {"store": store.identity()},
            "dictionary": known.name,
            "rules": {"latents": len(rows), "with a rule": ruled},
            "interval": f"bootstrap over {miner.groups} documents, or groups of neighbours",
            "tokens": {"explain": len(miner.explain), "score": len(miner.score)},
            "seed": seed,
            "cost": {"forwards": 0.0, "backwards": 0.0, "seconds": spent.seconds},
            "versions": versions(),
            "machine": machine(),
        },
    )


@dataclass(frozen=True)
class _Row:
    """Rule of a latent with its scores, intervals and null; without a rule all scores are 0, AUROC ½."""

    rule: Rule | None
    score: Tensor
    interval: Tensor
    null: Tensor
    chance: float
    held_out: int


def _explained(known: StoredLatents, miner: Miner) -> list[int]:
    """Return the latents that are active on four tokens of the explain half."""
    out = list[int]()
    for latent in (known.count >= 4).nonzero()[:, 0].tolist():
        rows = miner.corpus.row_of(known.codes(latent)[0].numpy())
        if int((~miner.corpus.held_out[rows]).sum()) >= 4:
            out.append(latent)
    return out


def _row(miner: Miner, known: StoredLatents, latent: int, resamples: int, samples: int) -> _Row:
    active = miner.corpus.active(known, latent)
    rule = miner.rule(active)
    counts, null = miner.counts(rule, active), list[np.ndarray]()
    for _ in range(samples):
        drawn = np.zeros_like(active)
        drawn[miner.g.choice(len(active), int(active.sum()), replace=False, shuffle=False)] = True
        null.append(measures(miner.counts(miner.rule(drawn), drawn).sum(0)))
    score, bounds = measures(counts.sum(0)), miner.interval(counts, resamples)
    bounds = np.stack([np.minimum(bounds[:, 0], score), np.maximum(bounds[:, 1], score)], -1)
    values, interval, chance = (torch.from_numpy(x).float() for x in (score, bounds, np.stack(null, -1)))
    return _Row(rule, values, interval, chance, chance_f1(counts.sum(0)), int(active[miner.score].sum()))


def _label(corpus: Corpus, dictionary: str, latent: int, row: _Row) -> Label:
    f1 = MEASURES.index("F1")
    low, chance = float(row.interval[f1, 0]), max(float(row.null[f1].max()), row.chance)
    said = "none of a few literals" if row.rule is None else row.rule.says(corpus)
    holds = row.rule is not None and low > max(chance, _LEAST)
    text = said if holds else f"{NONE} (best F1 {float(row.score[f1]):.2f}: {said})"
    scores: dict[str, Any] = {n: float(v) for n, v in zip(MEASURES, row.score, strict=True)}
    scores |= {f"{n} interval": v.tolist() for n, v in zip(MEASURES, row.interval, strict=True)}
    scores |= {
        "F1 by chance": row.chance,
        "F1 of random features": row.null[f1].tolist(),
        "held-out tokens": row.held_out,
    }
    details = {} if row.rule is None else {"family": row.rule.family, "literals": list(row.rule.literals)}
    return Label(dictionary, latent, RULE, text, scores, details)
