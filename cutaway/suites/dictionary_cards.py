"""The card at the end of a run: scores of the finished dictionaries on tokens that they were not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from cutaway.core.refuse import Refused
from cutaway.core.stats import wilson
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.controls import judge
from cutaway.dictionaries.evaluation.evidence import Evidence
from cutaway.dictionaries.evaluation.firing import firing_scores
from cutaway.dictionaries.evaluation.reconstruction import reconstruction_scores
from cutaway.dictionaries.evaluation.scores import Scores, joined
from cutaway.dictionaries.evaluation.stability import stability_of
from cutaway.dictionaries.training.endtoend import WholeBatch
from cutaway.dictionaries.training.update import Trained

MATCHED = 4096  # latents up to which seeds are matched one to one


def card(trained: Sequence[Trained], source: Any, *, tokens: int = 16384, seed: int = 0, nulls: int = 2) -> list[dict]:
    """Return the scores with intervals, nulls and controls of every dictionary of a run, and how alike their seeds are.

    The tokens are those that the source gives next: after a run, the ones behind those trained on. Whether they were
    trained on all the same, because the source had to begin again, is in `held_out` (None: the source does not say),
    and what a reader must know in `warnings`. Nothing of the run changes; the source is left where it was.

    Raises:
        Refused: the source has no further tokens, or too few documents.
    """
    before = source.state()
    try:
        batches = (b.tokens() if isinstance(b, WholeBatch) else b for b in source)
        evidence = Evidence.gather(islice(batches, tokens), tokens)
        rounds = getattr(source, "epoch", None)
    finally:
        source.restore(before)
    held_out = None if rounds is None else rounds == 0
    dictionaries = [t.dictionary for t in trained]
    made = []
    for t in trained:
        alike = seeds([d for d in dictionaries if _but_seed(d) == _but_seed(t.dictionary)])
        made.append(_card(t, judged(t.dictionary, evidence, seed, nulls), alike, held_out))
    return made


def judged(dictionary: Dictionary, evidence: Evidence, seed: int = 0, nulls: int = 2) -> Scores:
    """Score reconstruction and firing of a dictionary beside random dictionaries and the controls that fit it."""
    found = judge(dictionary, evidence, nulls, seed)
    return joined(
        [
            reconstruction_scores(found.encoded, null=found.null, control=found.control),
            firing_scores(found.encoded, null=found.null, control=found.control),
        ]
    )


def seeds(dictionaries: Sequence[Dictionary]) -> dict[str, Any]:
    """Compare dictionaries of one recipe and several seeds, or say why that is left out."""
    plain = [_but_seed(d) for d in dictionaries]
    if len(dictionaries) < 2 or any(p != plain[0] for p in plain):
        return {"none": "one seed a recipe; train the same recipe with several seeds in one run"}
    if dictionaries[0].n_latents > MATCHED:
        why = f"matching more than {MATCHED} latents one to one takes too long here"
        return {"none": f"{why}; see dictionaries.evaluation.stability"}
    found = stability_of(dictionaries)
    n = len(dictionaries)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    return {
        "seeds": [d.about["recipe"]["seed"] for d in dictionaries],
        "alike": [float(found.alike[p]) for p in pairs],
        "interval": [found.alike_interval[p].tolist() for p in pairs],
        "null": [found.alike_null[p].tolist() for p in pairs],
    }


def _but_seed(d: Dictionary) -> dict[str, Any]:
    return {**d.about["recipe"], "seed": None, "rate": None}


def _card(t: Trained, scores: Scores, alike: dict[str, Any], held_out: bool | None) -> dict[str, Any]:
    names = [str(n) for n in scores.labels["score"]]
    controls_ = [str(n) for n in scores.labels["control"]]
    rows = {
        name: {
            "value": float(scores.score[i]),
            "interval": scores.interval[i].tolist(),
            "random": scores.null[i].tolist(),
            "controls": dict(zip(controls_, scores.control[i].tolist(), strict=True)),
        }
        for i, name in enumerate(names)
    }
    n = t.dictionary.n_latents
    rows["dead"]["interval"] = list(wilson(round(rows["dead"]["value"] * n), n))  # over latents, on these tokens
    return {
        "dictionary": repr(t.dictionary),
        "recipe": t.dictionary.about["recipe"],
        "rate": t.rate,
        "tokens": t.tokens,
        "seconds": t.seconds,
        "tokens_per_second": t.tokens / max(t.seconds, 1e-9),
        "scores": rows,
        "judged": {k: v for k, v in scores.record.items() if k not in ("versions", "machine")},
        "seeds": alike,
        "curves": t.curves,
        "precision": t.choice.as_dict(),
        "held_out": held_out,
        "warnings": _warnings(rows, held_out),
    }


def _warnings(rows: dict[str, Any], held_out: bool | None) -> list[str]:
    """Sentences that a reader of the scores must know."""
    said = []
    for name, row in rows.items():
        if name.split(" of ")[0] == "FVU" and not row["value"] <= 1:
            said.append(f"{name} is {row['value']:.3g}: worse than the mean activation (1); try a lower rate")
    if held_out is False:
        why = "the source began anew, so these tokens were trained on"
        said.append(f"{why}: judge on other text with `cutaway dict eval`, or give more text")
    return said


def summary(made: dict[str, Any], names: Sequence[str] = ("FVU", "L0", "dead")) -> list[dict[str, Any]]:
    """Return the rows of a card that are shown first: value, interval, random, controls.

    Raises:
        Refused: a score that the card does not have.
    """
    unknown = [n for n in names if not any(s == n or s.startswith(f"{n} of ") for s in made["scores"])]
    if unknown:
        raise Refused(f"score {unknown[0]!r}", "the card does not have it", f"use {', '.join(made['scores'])}")
    chosen = [s for s in made["scores"] if any(s == n or s.startswith(f"{n} of ") for n in names)]
    return [{"score": s, **made["scores"][s]} for s in chosen]
