"""Every score of a dictionary on held-out activations, in one result.

Reconstruction, firing and geometry; where the truth is known also recovery and planted absorption. Everything fitted
for the controls is fitted on a first quarter of the evidence, everything judged on the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cutaway.dictionaries.benchmarks.truth import Truth
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.absorption import planted_absorption
from cutaway.dictionaries.evaluation.controls import judge
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence, encode_evidence
from cutaway.dictionaries.evaluation.firing import firing_scores
from cutaway.dictionaries.evaluation.geometry import geometry_scores
from cutaway.dictionaries.evaluation.matching import recovery
from cutaway.dictionaries.evaluation.reconstruction import reconstruction_scores
from cutaway.dictionaries.evaluation.scores import Scores, joined


@torch.no_grad()
def evaluate(
    dictionary: Dictionary,
    evidence: Evidence,
    *,
    truth: Truth | None = None,
    nulls: int = 2,
    others: Mapping[str, tuple[Dictionary, Evidence]] | None = None,
    seed: int = 0,
) -> Scores:
    """Measure every score that needs activations only, beside random dictionaries and controls.

    Args:
        dictionary: the dictionary judged.
        evidence: held-out activations of the sites that it reads and writes.
        truth: source of the activations, if the evidence has a true code.
        nulls: number of random dictionaries.
        others: further controls by name, each with its own evidence: the dictionary of a model with random weights.
        seed: seed of the random dictionaries.

    Raises:
        Refused: evidence of other sites, or too little of it.
    """
    judged = judge(dictionary, evidence, nulls, seed)
    encoded, null, own = judged.encoded, judged.null, judged.control
    foreign = {n: encode_evidence(d, e) for n, (d, e) in (others or {}).items()}
    parts = [
        reconstruction_scores(encoded, null=null, control=own | _alike(foreign, encoded)),
        firing_scores(encoded, null=null, control=own | foreign),
        geometry_scores(dictionary, samples=max(nulls, 1), seed=seed),
    ]
    if truth is not None:
        parts.append(recovery(encoded, truth.directions, null=null, control=own, seed=seed))
        if bool((truth.law.parent >= 0).any()):
            parts.append(planted_absorption(encoded, truth.directions, truth.law, null=null, seed=seed))
    return joined(parts)


def _alike(foreign: Mapping[str, EncodedEvidence], encoded: EncodedEvidence) -> dict[str, EncodedEvidence]:
    """Return those that write as many sites, so that their scores can stand in the same rows."""
    return {n: s for n, s in foreign.items() if len(s.output) == len(encoded.output)}
