"""Which direction, found how and where, tells texts with a concept from texts without it on unseen groups?

Every text is read once, at all addresses, as the mean over its tokens and at its last token. Texts that are a prompt
and a response are read as persona vectors are, too (Chen et al. 2025, arXiv:2507.21509): `response_mean` (their
response_avg), `prompt_mean` (prompt_avg; here without the first token) and `prompt_last`. Each finder then gives a
direction per reading and address, from differences of means to reading vectors (Marks & Tegmark 2023, arXiv:2310.06824;
Zou et al. 2023, arXiv:2310.01405; Rimsky et al. 2023, arXiv:2312.06681).

* `auroc[finder, reading, address]`: a direction is found on some groups of texts and orders the texts of the others
  along it; the share of pairs of a text with the concept and one without that come in the right order. `interval`:
  95 %, over groups.
* `vector`: the direction found on all texts. Its length is the distance of the class means along it: adding it once
  moves the texts without the concept to those with it. Candidates without any difference are zero, and named in the
  record; they have no `auroc`.
* `midpoint`: the component half way between the class means, where a threshold may stand.
* `cosine`: with the difference of means at the same place.
* Control: directions found with shuffled labels (`null`), whose sign is drawn: far below ½ is chance, too.
* Finders: `mean_difference`; `contrastive_pairs`, the mean difference of pairs within groups (CAA; ActAdd with one
  pair); `logistic` and `ridge` probes; `reading_vector` (RepE's LAT: PCA of randomly ordered differences);
  `pca_pairs` (uncentred differences of pairs, as steering-vectors has it) and `pca_centred_pairs` (repeng's pca_diff).
* Assumption: the groups share neither templates nor words that give the label away; otherwise words are found.
* Known failures: PCA on centred differences takes out the mean difference itself (a note says so). Few groups give wide
  intervals. A direction that reads a concept need not write it: steer and erase to see.
* Equivalence (test): of complete pairs, `contrastive_pairs` is `mean_difference`.
* Index trap: files of persona vectors have a row per hidden state. Row 0 is the embedding, so row ℓ + 1 is
  `resid_post.ℓ`; behind the last one stands the final norm, so it is no `resid_post`.
* Cost: one forward per text, and one fit per finder, reading, address, fold and null sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cutaway.core.address import Pattern
from cutaway.core.method import method
from cutaway.core.record import note
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.stats import BOUNDS, generator
from cutaway.directions.finders import FINDERS, Sample, pairs_of
from cutaway.directions.found import FoundDirections
from cutaway.interventions.probes import Fold, auroc, auroc_interval, folds
from cutaway.interventions.text_vectors import READINGS, text_vectors
from cutaway.models.model import Model
from cutaway.tasks.labelled import Labelled

_NAMED = 8  # candidates without a difference that a note names


@method(
    answers="Which direction, found how and where, tells texts with a concept from texts without it on unseen groups?",
    paper="Zou et al. 2023, arXiv:2310.01405",
    cost="texts * F",
    control="shuffled_labels",
    rung="observational",
)
def find(
    model: Model,
    labelled: Labelled,
    /,
    *,
    sites: tuple[Pattern, ...] = ("resid_post",),
    readings: tuple[str, ...] = READINGS,
    finders: tuple[str, ...] = tuple(FINDERS),
    concept: str | None = None,
    samples: int = 3,
    seed: int = 0,
) -> FoundDirections:
    """Find directions of a concept at all addresses at once, and test them on groups that they were not found on.

    Args:
        sites: addresses or sites whose values are vectors of one width.
        readings: mean (over the tokens) and last (token); of prompts with responses response_mean, prompt_mean and
            prompt_last, too.
        finders: ways to find a direction.
        concept: the concept; None means the first.
        samples: number of shuffles of the labels.
        seed: seed of the folds, the shuffles and what finders draw.

    Raises:
        Refused: one class or one group only, empty texts, or an unknown finder, reading, concept or site.
    """
    if wrong := [f for f in finders if f not in FINDERS]:
        raise Refused(Keyword("finders", wrong[0]), "no direction is found so", f"use {', '.join(FINDERS)}")
    c = labelled.concept(concept)
    y, group = labelled.shown[:, c].cpu(), labelled.group_of
    parts = folds(y, group, seed=seed)
    found = text_vectors(model, labelled.texts, sites, readings, prompts=labelled.prompts)
    g = generator(seed)
    shuffled = [y[torch.randperm(len(y), generator=g)] for _ in range(samples)]
    test = _Test(y, group, parts, shuffled, seed)
    cells = [[[test.cell(f, x) for x in of_reading] for of_reading in found.vectors] for f in finders]

    def field(name: str) -> Tensor:
        return torch.stack([torch.stack([torch.stack([c[name] for c in row]) for row in own]) for own in cells])

    vector = field("vector")
    names = [str(a) for a in found.addresses]
    return FoundDirections(
        auroc=field("auroc"),
        interval=field("interval"),
        null=field("null"),
        cosine=field("cosine"),
        vector=vector,
        midpoint=field("midpoint"),
        concept=labelled.concepts[c],
        family=model.family.name,
        labels={"finder": list(finders), "reading": list(found.readings), "address": names, "bound": BOUNDS},
        units={"auroc": "AUROC", "cosine": "cosine", "vector": "activation", "midpoint": "activation"},
        reasons=dict.fromkeys(("cosine", "vector", "midpoint"), "found on all texts"),
        record=_about(labelled, c, test, _warnings(vector, finders, found.readings, names)),
    )


@dataclass(frozen=True)
class _Test:
    """Labels, groups and folds that the directions of every cell are found and tested on."""

    y: Bool[Tensor, "text"]
    group: Int[Tensor, "text"]
    parts: list[Fold]
    shuffled: list[Bool[Tensor, "text"]]
    seed: int

    def cell(self, finder: str, x: Float[Tensor, "text width"]) -> dict[str, Tensor]:
        """Return every field of one finder, reading and address."""
        vector = self._found(finder, x, self.y)
        unit = torch.nn.functional.normalize(vector, dim=0)
        difference = Sample(x, self.y, torch.empty(0, 2, dtype=torch.long)).difference
        middle = (x[self.y].mean(0) + x[~self.y].mean(0)) / 2
        scores = self._scores(finder, x, self.y)
        apart = bool(vector.any()) and bool(scores.isfinite().all())
        nothing = torch.tensor(torch.nan)
        null = [auroc(own, self.y) if own.isfinite().all() else nothing for own in self._null(finder, x)]
        return {
            "auroc": auroc(scores, self.y) if apart else nothing,
            "interval": auroc_interval(scores, self.y, self.group) if apart else nothing.expand(2),
            "null": torch.stack(null),
            "cosine": cosine_similarity(vector, difference, dim=0),
            "vector": vector,
            "midpoint": unit @ middle,
        }

    def _null(self, finder: str, x: Tensor) -> list[Tensor]:
        return [self._scores(finder, x, labels) for labels in self.shuffled]

    def _scores(self, finder: str, x: Tensor, labels: Tensor) -> Float[Tensor, "text"]:
        """Return each text's component along the direction found on the other folds, in units of their spread."""
        out = torch.full((len(x),), torch.nan)
        for fit, test in self.parts:
            if labels[fit].any() and not labels[fit].all():
                along = torch.nn.functional.normalize(self._found(finder, x[fit], labels[fit], self.group[fit]), dim=0)
                seen = x[fit] @ along
                out[test] = (x[test] @ along - seen.mean()) / seen.std()
        return out

    def _found(self, finder: str, x: Tensor, y: Tensor, group: Tensor | None = None) -> Float[Tensor, "width"]:
        pairs = pairs_of(y, self.group if group is None else group)
        return FINDERS[finder].find(Sample(x, y, pairs, self.seed))


def _warnings(vector: Tensor, finders: tuple[str, ...], readings: tuple[str, ...], names: list[str]) -> list[str]:
    """Tell readers of finders that say little and of places where the classes do not differ; return those places."""
    for f in finders:
        if FINDERS[f].warning:
            note(f"{f}: {FINDERS[f].warning}")
    zero = ~vector[0].any(-1)
    same = [f"{names[j]} ({readings[i]})" for i, j in zero.nonzero().tolist()]
    if same:
        more = f" and {len(same) - _NAMED} more" if len(same) > _NAMED else ""
        note(f"zero difference: the two classes are the same at {', '.join(same[:_NAMED])}{more}")
    return same


def _about(labelled: Labelled, concept: int, test: _Test, same: list[str]) -> dict[str, object]:
    shown = int(test.y.sum())
    return {
        "concept": labelled.concepts[concept],
        "texts": {"with": shown, "without": len(test.y) - shown, "groups": len(test.group.unique())},
        "folds": len(test.parts),
        "interval": f"95 % over {len(test.group.unique())} groups",
        **({"groups": list(dict.fromkeys(labelled.groups))} if labelled.groups else {}),
        **({"zero difference": same} if same else {}),
    }
