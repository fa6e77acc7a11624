"""The end card of a run: what the finished dictionaries do on tokens they have not been trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from cutaway.core.refuse import Refused
from cutaway.core.stats import wilson
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.judge.controls import controls, random_dictionary
from cutaway.dictionaries.judge.evidence import Evidence, observe
from cutaway.dictionaries.judge.firing import firing_scores
from cutaway.dictionaries.judge.reconstruction import reconstruction
from cutaway.dictionaries.judge.scores import Scores, joined
from cutaway.dictionaries.judge.stability import stability
from cutaway.dictionaries.train.loop import Trained

MATCHED = 4096  # latents up to which seeds are matched one to one


def card(trained: Sequence[Trained], source: Any, *, tokens: int = 16384, seed: int = 0, nulls: int = 2) -> list[dict]:
    """Scores with intervals, nulls and controls of every dictionary of a run, and how alike their seeds are.

    The tokens are those that the source gives next: after a run, the ones behind those trained on (a source that
    repeats itself repeats them). Nothing of the run changes; the source is left where it was.

    Raises:
        Refused: the source has no further tokens.
    """
    before = source.state()
    try:
        evidence = Evidence.gather(islice(iter(source), tokens), tokens)
    finally:
        source.restore(before)
    dictionaries = [t.dictionary for t in trained]
    alike = seeds(dictionaries)
    return [_card(t, judged(t.dictionary, evidence, seed, nulls), alike) for t in trained]


@torch.no_grad()
def judged(dictionary: Dictionary, evidence: Evidence, seed: int = 0, nulls: int = 2) -> Scores:
    """Reconstruction and firing of a dictionary beside random dictionaries and the controls that fit it."""
    fit, rest = evidence.parted()
    seen = observe(dictionary, rest)
    random = [observe(random_dictionary(dictionary, fit, seen.l0, seed=seed + i), rest) for i in range(nulls)]
    others = {n: observe(d, rest) for n, d in controls(dictionary, fit, seen.l0).items()}
    return joined([
        reconstruction(seen, null=random, control=others, seed=seed),
        firing_scores(seen, null=random, control=others),
    ])  # fmt: skip


def seeds(dictionaries: Sequence[Dictionary]) -> dict[str, Any]:
    """How alike dictionaries of one recipe and several seeds are, or why that is not said."""
    plain = [{**d.about["recipe"], "seed": None, "rate": None} for d in dictionaries]
    if len(dictionaries) < 2 or any(p != plain[0] for p in plain):
        return {"none": "one seed a recipe; train the same recipe with several seeds in one run"}
    if dictionaries[0].n_latents > MATCHED:
        return {"none": f"matching more than {MATCHED} latents one to one takes too long here; see judge.stability"}
    found = stability(dictionaries)
    n = len(dictionaries)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    return {
        "seeds": [d.about["recipe"]["seed"] for d in dictionaries],
        "alike": [float(found.alike[p]) for p in pairs],
        "interval": [found.alike_interval[p].tolist() for p in pairs],
        "null": [found.alike_null[p].tolist() for p in pairs],
    }


def _card(t: Trained, scores: Scores, alike: dict[str, Any]) -> dict[str, Any]:
    names = [str(n) for n in scores.labels["score"]]
    controls_ = [str(n) for n in scores.labels["control"]]
    rows = {
        name: {
            "value": float(scores.score[i]), "interval": scores.interval[i].tolist(),
            "random": scores.null[i].tolist(),
            "controls": dict(zip(controls_, scores.control[i].tolist(), strict=True)),
        }
        for i, name in enumerate(names)
    }  # fmt: skip
    n = t.dictionary.n_latents
    rows["dead"]["interval"] = list(wilson(round(rows["dead"]["value"] * n), n))  # over latents, on these tokens
    return {
        "dictionary": repr(t.dictionary), "recipe": t.dictionary.about["recipe"], "rate": t.rate,
        "tokens": t.tokens, "seconds": t.seconds, "tokens_per_second": t.tokens / max(t.seconds, 1e-9),
        "scores": rows, "judged": {k: v for k, v in scores.record.items() if k not in ("versions", "machine")},
        "seeds": alike, "curves": t.curves, "precision": t.choice.as_dict(),
    }  # fmt: skip


def summary(made: dict[str, Any], names: Sequence[str] = ("FVU", "L0", "dead")) -> list[dict[str, Any]]:
    """The rows of a card that are shown first: value, interval, random, controls.

    Raises:
        Refused: a score that the card does not have.
    """
    unknown = [n for n in names if not any(s == n or s.startswith(f"{n} of ") for s in made["scores"])]
    if unknown:
        raise Refused(f"score {unknown[0]!r}", "the card does not have it", f"use {', '.join(made['scores'])}")
    chosen = [s for s in made["scores"] if any(s == n or s.startswith(f"{n} of ") for n in names)]
    return [{"score": s, **made["scores"][s]} for s in chosen]
