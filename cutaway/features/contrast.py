"""Which latents, amplified and suppressed together, tell two groups of texts apart?

Every text is read once, as the mean over its tokens or at its last token, and encoded at each (contrast in the space of
latents: FGAA, Soo et al. 2025, arXiv:2501.09929; its linear map to a vector and its filter of dense latents are left
out). What steers is `direction()`: f + strength · difference, with the reconstruction error kept.

* `difference[latent]` = mean activation in texts with the concept − that in texts without it, of the `top` latents each
  way for which it writes most (times the decoder's norm): positive ones are amplified, negative ones suppressed.
  `interval`: 95 %, over groups.
* `auroc`: latents are chosen on some groups, and order the texts of the others by f·w / w·w (w: the differences);
  `auroc_interval`: 95 %, over groups.
* `density[latent]`: share of the texts' tokens on which it is active. `matched` are others of like density and
  decoder norm, from which random steering is drawn: each the eighth nearest at most of those that are left.
* Control: the whole choice with shuffled labels (`null`: the difference of the same rank; `auroc_null`).
* Assumption: the groups share neither templates nor words that give the label away; otherwise words are found.
* Known failures: a latent that reads a concept need not write it (steer with `directions.steer` to see). Chosen among
  many, differences are too large: compare them with `null`, not with 0. Few groups give wide intervals.
* Equivalences (tests): with nothing to suppress, steering adds the vector Σ w d; strength 0 changes no bit.
* Cost: one forward per text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core import repeat as again
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.parts import decoder_norms
from cutaway.dictionaries.splice import Splice
from cutaway.features.latent_direction import NEAREST, LatentDirection
from cutaway.features.latents import encoded
from cutaway.interventions.probes import Fold, auroc, auroc_interval, difference_interval, folds
from cutaway.interventions.text_vectors import text_means
from cutaway.models.model import Model
from cutaway.tasks.labelled import Labelled


@dataclass(frozen=True, kw_only=True)
class LatentContrast(Result, kind="latent_contrast"):
    """Latents whose activations differ most between texts with and without a concept.

    Attributes:
        difference: the mean activation in texts with the concept − that in texts without it.
        interval: of `difference`, 95 %, over groups.
        null: the difference of the same rank with shuffled labels.
        density: share of the texts' tokens on which each latent is active.
        auroc: of texts of groups that latents were not chosen on.
        auroc_interval: 95 %, over groups.
        auroc_null: the same with shuffled labels.
        index: the number of each latent.
        matched: other latents of like density and decoder norm, the most alike first.
        concept: the name of the concept.
        reading: the reading of each text.
        family: the family of the model.
        dictionary: the words that open the dictionary; empty if they are not known.
        fingerprint: the hash of the dictionary.
    """

    page = ("auroc",)
    difference: Float[Tensor, "latent"]
    interval: Float[Tensor, "latent bound"]
    null: Float[Tensor, "latent sample"]
    density: Float[Tensor, "latent"]
    auroc: Float[Tensor, ""]
    auroc_interval: Float[Tensor, "bound"]
    auroc_null: Float[Tensor, "sample"]
    index: Int[Tensor, "latent"]
    matched: Int[Tensor, "latent match"]
    concept: str
    reading: str
    family: str
    dictionary: str
    fingerprint: str

    def direction(self, dictionary: Dictionary | None = None) -> LatentDirection:
        """Return the latents as a direction, which is steered with and saved.

        Args:
            dictionary: their dictionary; None leaves it closed.
        """
        about = {n: self.record[n] for n in ("subjects", "options", "versions", "groups") if n in self.record}
        found = LatentDirection(
            weight=self.difference,
            index=self.index,
            matched=self.matched,
            dictionary=self.dictionary,
            fingerprint=self.fingerprint,
            name=self.concept,
            positive=self.concept,
            negative=f"not {self.concept}",
            family=self.family,
            labels={"latent": self.labels["latent"]},
            units={"weight": self.units["difference"]},
            reasons=dict.fromkeys(("weight", "index", "matched"), "latents as a direction are no measurement"),
            record=about,
        )
        return found if dictionary is None else found.of(dictionary)


@method(
    answers="Which latents, amplified and suppressed together, tell two groups of texts apart?",
    paper="Soo et al. 2025, arXiv:2501.09929",
    cost="texts * F",
    control="shuffled_labels",
    rung="observational",
)
def contrast(
    model: Model,
    dictionary: Dictionary,
    labelled: Labelled,
    /,
    *,
    top: int = 8,
    reading: str = "mean",
    concept: str | None = None,
    samples: int = 5,
    seed: int = 0,
) -> LatentContrast:
    """Find the latents that differ most between texts with and without a concept, and test them on other groups.

    Args:
        top: number of latents each way.
        reading: mean or last; of prompts with responses response_mean, prompt_mean and prompt_last, too.
        concept: the concept; None means the first.
        samples: number of shuffles of the labels.
        seed: seed of the folds and the shuffles.

    Raises:
        Refused: one class or one group only, empty texts, an unknown reading, fewer than four times `top` latents, no
            latent that differs, or a dictionary that cannot be spliced in.
    """
    Splice(dictionary, error=True)
    if not 0 < 4 * top <= dictionary.n_latents:
        why = f"the dictionary has {dictionary.n_latents} latents, and the control needs as many others"
        raise Refused(Keyword("top", top), why, f"use 1 to {dictionary.n_latents // 4}")
    c = labelled.concept(concept)
    y, group = labelled.shown[:, c].cpu(), labelled.group_of
    parts, g = folds(y, group, seed=seed), generator(seed)
    code, density = _codes(model, dictionary, labelled, reading)
    shuffled = [y[torch.randperm(len(y), generator=g)] for _ in range(samples)]
    norm = _written(dictionary)
    test = _Test(code, norm, group, parts, top)
    index = test.choice(code, y)
    if not len(index):
        raise Refused(f"{len(y)} labelled texts", "no latent differs between the classes", "read another place")
    scores = test.scores(y)
    chance = torch.stack([test.ranked(own, y, index) for own in shuffled], 1)
    how = again.made("dictionary", dictionary)
    return LatentContrast(
        difference=_difference(code, y)[index],
        interval=difference_interval(code[:, index], y, group),
        null=chance,
        density=density[index],
        auroc=auroc(scores, y),
        auroc_interval=auroc_interval(scores, y, group),
        auroc_null=torch.stack([auroc(test.scores(own), y) for own in shuffled]),
        index=index,
        matched=_matched(density, norm, index),
        concept=labelled.concepts[c],
        reading=reading,
        family=model.family.name,
        dictionary="" if how.no_flags else str(how.flags[""]),
        fingerprint=dictionary.fingerprint(),
        labels={"latent": [str(i) for i in index.tolist()], "bound": BOUNDS},
        units={"difference": "activation", "density": "share of tokens", "auroc": "AUROC"},
        reasons={"density": "counted", "index": "a number", "matched": "numbers"},
        record=_about(labelled, y, parts),
    )


@dataclass(frozen=True)
class _Test:
    """Choice of latents on all texts, and on folds of them.

    Attributes:
        code: the activation of each latent in each text.
        norm: the length of what one unit of each latent writes.
        group: the group of each text.
        parts: the folds.
        top: number of latents each way.
    """

    code: Float[Tensor, "text latent"]
    norm: Float[Tensor, "latent"]
    group: Int[Tensor, "text"]
    parts: list[Fold]
    top: int

    def choice(self, code: Float[Tensor, "fit latent"], y: Bool[Tensor, "fit"]) -> Int[Tensor, "chosen"]:
        """Return the latents that differ most, those to be amplified first, each way in order of what is written."""
        written = _difference(code, y) * self.norm
        both = [(sign * written).topk(self.top) for sign in (1, -1)]
        return torch.cat([found.indices[found.values > 0] for found in both])

    def ranked(
        self, labels: Bool[Tensor, "text"], y: Bool[Tensor, "text"], index: Int[Tensor, "chosen"]
    ) -> Float[Tensor, "chosen"]:
        """Return the difference of the latent of the same rank with other labels; 0 where there is none."""
        up = int((_difference(self.code, y)[index] > 0).sum())
        found = self.choice(self.code, labels)
        values = _difference(self.code, labels)[found]
        out = torch.zeros(len(index))
        for place, own in ((0, values[values > 0][:up]), (up, values[values < 0][: len(index) - up])):
            out[place : place + len(own)] = own
        return out

    def scores(self, labels: Bool[Tensor, "text"]) -> Float[Tensor, "text"]:
        """Return each text's component along the latents chosen on the other folds, in units of their spread."""
        out = torch.zeros(len(labels))
        for fit, test in self.parts:
            if labels[fit].any() and not labels[fit].all():
                index = self.choice(self.code[fit], labels[fit])
                w = _difference(self.code[fit], labels[fit])[index]
                seen = self.code[fit][:, index] @ w
                out[test] = (self.code[test][:, index] @ w - seen.mean()) / seen.std().clamp_min(1e-12)
        return out


def _difference(code: Float[Tensor, "text latent"], y: Bool[Tensor, "text"]) -> Float[Tensor, "latent"]:
    return code[y].mean(0) - code[~y].mean(0)


def _codes(
    model: Model, d: Dictionary, labelled: Labelled, reading: str
) -> tuple[Float[Tensor, "text latent"], Float[Tensor, "latent"]]:
    """Return the mean activation of each latent in each text, and its density over all their tokens but the first."""

    def values(acts: Any) -> list[Float[Tensor, "text position latent"]]:
        moved = {s: acts[s].to(d.device) for s in d.reads}
        dense = encoded(d, moved).dense().float().reshape(*moved[d.reads[0]].shape[:2], -1)
        return [dense, (dense != 0).float()]

    readings = tuple(dict.fromkeys((reading, "mean")))
    means, tokens = text_means(model, labelled.texts, model.places(d.reads), readings, values, prompts=labelled.prompts)
    weight = (tokens.lengths - 1).clamp_min(1).to(means).cpu()
    return means[0, 0], (means[-1, 1] * weight[:, None]).sum(0) / weight.sum()


def _written(d: Dictionary) -> Float[Tensor, "latent"]:
    """Return the length of what one unit of each latent writes, over all its sites."""
    return torch.cat([decoder_norms(rows).float() for rows in d.decoder]).cpu()


def _matched(
    density: Float[Tensor, "latent"], norm: Float[Tensor, "latent"], index: Int[Tensor, "chosen"]
) -> Int[Tensor, "chosen match"]:
    """Return the others that are nearest to each latent in log density and log norm, in units of their spread."""
    others = torch.ones(len(density), dtype=torch.bool)
    others[index] = False
    rest = others.nonzero()[:, 0]
    least = density[density > 0].min()
    x = torch.stack([density.clamp_min(least / 2).log(), norm.clamp_min(1e-12).log()], 1)
    x = x / x.std(0).clamp_min(1e-6)
    number = min(len(rest), len(index) + NEAREST)
    return rest[torch.cdist(x[index], x[rest]).argsort(dim=1, stable=True)[:, :number]]


def _about(labelled: Labelled, y: Bool[Tensor, "text"], parts: list[Fold]) -> dict[str, Any]:
    shown, groups = int(y.sum()), list(dict.fromkeys(labelled.groups))
    return {
        "texts": {"with": shown, "without": len(y) - shown, "groups": len(set(labelled.names))},
        "folds": len(parts),
        "interval": f"95 % over {len(set(labelled.names))} groups",
        **({"groups": groups} if groups else {}),
    }
