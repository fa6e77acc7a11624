"""At which layers can a concept be read by a linear probe, and more than words, chance and memory explain?

Every text is read once, at all addresses, as the mean over its tokens and at its last token. A logistic probe (Alain &
Bengio 2016, arXiv:1610.01644) is fitted on some groups of texts and tested on the others.

* `accuracy[reading, layer]` and `auroc` on held-out groups; `interval` and `auroc_interval`: 95 %, over groups, so that
  texts of one template do not count as many.
* `control[reading, layer, sample]`: accuracy on a control task (Hewitt & Liang 2019, arXiv:1909.03368): each word type
  has a random label, and a text has that of its rarest token that other groups know. `selectivity` is accuracy −
  control: a probe that memorises words has little of it.
* `words`: accuracy of the same probe on counts of tokens, without any model. `majority`: of the more frequent class.
* `curve[step]`: accuracy at the best place by the number of texts that the probe is fitted on; `words_curve`: of the
  probe on counts of tokens.
* `compression[reading, layer]`, on request: the length of the labels divided by that of their online code (Voita &
  Titov 2020, arXiv:2003.12298), which sends each block of texts with a probe fitted on those before: 1 is no
  compression. `control_compression`: of the labels of a control task.
* Control: shuffled labels (`null`, `auroc_null`), fitted and tested like the real ones.
* Assumption: groups share neither templates nor words that give the label away. The axis is `address` where the places
  are not layers of one site.
* Known failures: a concept that can be read need not be used; erase the direction to see. The best place is chosen on
  the same folds, so its accuracy is a little too high. Few groups give wide intervals.
* Equivalences (tests): the accuracy is that of scikit-learn's cross-validation on the same folds.
* Cost: one forward per text, and one fit per place, fold, null sample and control task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Pattern
from cutaway.core.method import method
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator
from cutaway.interventions import probes
from cutaway.interventions.probes import Fold, Scorer, held_out_scores, logistic_scores
from cutaway.interventions.text_vectors import READINGS, TextVectors, text_vectors
from cutaway.models.model import Model
from cutaway.tasks.labelled import Labelled

#: shares of the texts after which the online code fits a new probe (Voita & Titov 2020)
BLOCKS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
_SMALLEST = 8  # texts that the curve begins with


@dataclass(frozen=True, kw_only=True)
class Probes(Result, kind="probes"):
    """Accuracy of linear probes of a concept by reading and place, beside what words, chance and memory explain.

    Attributes:
        accuracy: on held-out groups.
        interval: of `accuracy`, 95 %, over groups.
        null: `accuracy` with shuffled labels.
        auroc: on held-out groups.
        auroc_interval: of `auroc`, 95 %, over groups.
        auroc_null: `auroc` with shuffled labels.
        control: accuracy on control tasks, whose labels go by word types.
        selectivity: `accuracy` − mean of `control`.
        selectivity_interval: of `selectivity`, 95 %, over groups.
        compression: length of the labels over that of their online code.
        control_compression: the same of a control task.
        words: accuracy of the probe on counts of tokens.
        words_interval: of `words`, 95 %, over groups.
        majority: accuracy of the more frequent class.
        curve: accuracy at the best place by the number of texts that the probe is fitted on.
        curve_interval: of `curve`, 95 %, over groups.
        words_curve: the same of the probe on counts of tokens.
        concept: the name of the concept.
        best: the reading and the address with the highest accuracy, of which `curve` is.
    """

    page = ("auroc", "selectivity", "curve")
    accuracy: Float[Tensor, "reading *cell"]
    interval: Float[Tensor, "reading *cell bound"]
    null: Float[Tensor, "reading *cell sample"]
    auroc: Float[Tensor, "reading *cell"]
    auroc_interval: Float[Tensor, "reading *cell bound"]
    auroc_null: Float[Tensor, "reading *cell sample"]
    control: Float[Tensor, "reading *cell sample"]
    selectivity: Float[Tensor, "reading *cell"]
    selectivity_interval: Float[Tensor, "reading *cell bound"]
    compression: Float[Tensor, "reading *cell"] | None
    control_compression: Float[Tensor, "reading *cell"] | None
    words: Float[Tensor, ""]
    words_interval: Float[Tensor, "bound"]
    majority: Float[Tensor, ""]
    curve: Float[Tensor, "step"]
    curve_interval: Float[Tensor, "step bound"]
    words_curve: Float[Tensor, "step"]
    concept: str
    best: tuple[str, ...]


@method(
    answers="At which layers can a concept be read by a linear probe, and more than words, chance and memory explain?",
    paper="Hewitt & Liang 2019, arXiv:1909.03368",
    cost="texts * F",
    control="shuffled_labels_and_control_tasks",
    rung="observational",
)
def probe(
    model: Model,
    labelled: Labelled,
    /,
    *,
    sites: tuple[Pattern, ...] = ("resid_post",),
    readings: tuple[str, ...] = READINGS,
    concept: str | None = None,
    strength: float = probes.STRENGTH,
    mdl: bool = False,
    samples: int = 4,
    seed: int = 0,
) -> Probes:
    """Fit linear probes of a concept at all addresses at once, and test them on groups that they were not fitted on.

    Args:
        sites: addresses or sites whose values are vectors of one width.
        readings: mean (over the tokens) and last (token); of prompts with responses response_mean, prompt_mean and
            prompt_last, too.
        concept: the concept; None means the first.
        strength: the inverse of the L2 penalty, on coordinates of unit spread.
        mdl: True to measure the compression of the labels, too.
        samples: number of shuffles of the labels, of control tasks, and of draws of the curve.
        seed: seed of the folds and of what is drawn.

    Raises:
        Refused: one class or one group only, empty texts, or an unknown reading, concept or site.
    """
    if strength <= 0:
        raise Refused(Call("directions.probe", {"strength": strength}), "it divides the penalty", "give a positive one")
    c = labelled.concept(concept)
    y, group = labelled.shown[:, c].cpu(), labelled.group_of
    parts = probes.folds(y, group, seed=seed)
    vectors = text_vectors(model, labelled.texts, sites, readings, prompts=labelled.prompts)
    g, scorer = generator(seed), logistic_scores(strength)
    shuffled = torch.stack([y[torch.randperm(len(y), generator=g)] for _ in range(samples)])
    types = probes.word_types(vectors.tokens, group)
    labels = torch.cat([y[None], shuffled, probes.control_labels(types, float(y.float().mean()), samples, g)])
    each = [[held_out_scores(x, labels, parts, scorer) for x in own] for own in vectors.vectors]
    scores = torch.stack([torch.stack(own) for own in each]).movedim(2, 0)
    words = probes.bag_of_tokens(vectors.tokens)
    own = _own(scores, labels, group, samples)
    flat = int(own["accuracy"].argmax())
    at = flat // len(vectors.addresses), flat % len(vectors.addresses)
    sizes = _sizes(parts)
    of_words = held_out_scores(words, y[None], parts, scorer)[0]
    curve, words_curve = (_curve(x, y, parts, sizes, samples, scorer, seed) for x in (vectors.vectors[at], words))
    codes = _codes(vectors, labels[[0, -1]], strength, seed) if mdl else (None, None)
    grid, names = _grid(vectors)
    majority = probes.majority(y, parts)
    return Probes(
        **own,
        compression=codes[0],
        control_compression=codes[1],
        words=probes.accuracy(of_words, y),
        words_interval=probes.accuracy_interval(of_words, y, group),
        majority=torch.tensor(majority),
        curve=probes.accuracy(curve, y).mean(0),
        curve_interval=probes.mean_over_groups(((curve > 0) == y).float().mean(0), group, within=(0.0, 1.0)),
        words_curve=probes.accuracy(words_curve, y).mean(0),
        concept=labelled.concepts[c],
        best=(vectors.readings[at[0]], str(vectors.addresses[at[1]])),
        grid=(grid,),
        labels={"reading": list(vectors.readings), grid: names, "step": sizes, "bound": BOUNDS},
        units=_UNITS | ({"compression": "ratio"} if mdl else {}),
        neutral=dict.fromkeys(("accuracy", "words", "curve", "words_curve"), majority),
        reasons=_REASONS,
        record=_about(y, group, parts, vectors),
    )


_SHARES = ("accuracy", "null", "control", "selectivity", "words", "majority", "curve", "words_curve")
_BASELINES, _LENGTHS = ("majority", "words", "words_curve", "control"), ("compression", "control_compression")
_REASONS: dict[str, str] = dict.fromkeys(_BASELINES, "a baseline of the same folds")
_REASONS |= dict.fromkeys(_LENGTHS, "a length of all labels")
_UNITS: dict[str, str] = dict.fromkeys(_SHARES, "probability") | {"auroc": "AUROC"}


def _own(
    scores: Float[Tensor, "labels reading cell text"],
    labels: Bool[Tensor, "labels text"],
    group: Int[Tensor, "text"],
    samples: int,
) -> dict[str, Tensor]:
    """Return the fields per reading and place, of the real labels, the shuffled ones and those of control tasks."""
    y, real = labels[0], scores[0]
    shuffled, drawn = range(1, 1 + samples), range(1 + samples, len(labels))
    hits = ((real > 0) == y).float()
    controlled = torch.stack([((scores[i] > 0) == labels[i]).float() for i in drawn])
    gain = hits - controlled.mean(0)
    return {
        "accuracy": hits.mean(-1),
        "interval": probes.accuracy_interval(real, y, group),
        "null": torch.stack([probes.accuracy(scores[i], labels[i]) for i in shuffled], -1),
        "auroc": probes.auroc(real, y),
        "auroc_interval": probes.auroc_interval(real, y, group),
        "auroc_null": torch.stack([probes.auroc(scores[i], labels[i]) for i in shuffled], -1),
        "control": controlled.mean(-1).movedim(0, -1),
        "selectivity": gain.mean(-1),
        "selectivity_interval": probes.mean_over_groups(gain, group, within=(-1.0, 1.0)),
    }


def _sizes(parts: Sequence[Fold]) -> list[int]:
    """Return numbers of texts to fit on: powers of two, and all that every fold has."""
    most = min(len(fit) for fit, _ in parts)
    powers = [1 << n for n in range(_SMALLEST.bit_length() - 1, most.bit_length()) if 1 << n < most]
    return [*powers, most]


def _curve(
    x: Float[Tensor, "text width"],
    y: Bool[Tensor, "text"],
    parts: Sequence[Fold],
    sizes: Sequence[int],
    draws: int,
    scorer: Scorer,
    seed: int,
) -> Float[Tensor, "draw step text"]:
    """Return held-out scores of probes fitted on some of the texts, with shares of both classes as in all of them."""
    g = generator(seed)
    out = torch.zeros(draws, len(sizes), len(x))
    for d in range(draws):
        for fit, test in parts:
            order = _mixed(fit[torch.randperm(len(fit), generator=g)], y)
            for s, size in enumerate(sizes):
                some = order[:size]
                out[d, s, test] = scorer(x[some], y[some][None], x[test])[0]
    return out


def _mixed(order: Int[Tensor, "some"], y: Bool[Tensor, "text"]) -> Int[Tensor, "some"]:
    """Return texts in an order in which every beginning has about the same share of both classes."""
    rank = torch.zeros(len(order))
    for own in (y[order], ~y[order]):
        rank[own] = (torch.arange(int(own.sum())) + 0.5) / int(own.sum())
    return order[rank.argsort(stable=True)]


def _codes(
    vectors: TextVectors, labels: Bool[Tensor, "labels text"], strength: float, seed: int
) -> tuple[Float[Tensor, "reading cell"], Float[Tensor, "reading cell"]]:
    """Return the compression of two sets of labels by online codes at each place."""
    order = torch.randperm(labels.shape[1], generator=generator(seed))
    scorer = logistic_scores(strength)
    found = [[[_code(x[order], y[order], scorer) for x in own] for own in vectors.vectors] for y in labels]
    real, control = torch.tensor(found)
    return real, control


def _code(x: Float[Tensor, "text width"], y: Bool[Tensor, "text"], scorer: Scorer) -> float:
    """Return the compression of labels by an online code: one bit per label over their code length."""
    ends = sorted({max(1, math.ceil(share * len(x))) for share in BLOCKS})
    bits = float(ends[0])
    for known, end in pairwise(ends):
        taught = y[:known]
        if taught.all() or not taught.any():
            bits += end - known  # nothing to fit on yet: a bit each
            continue
        odds = scorer(x[:known], taught[None], x[known:end])[0]
        bits -= float(torch.nn.functional.logsigmoid(torch.where(y[known:end], odds, -odds)).sum()) / math.log(2)
    return len(x) / bits


def _grid(vectors: TextVectors) -> tuple[str, list[str | int]]:
    """Return the axis of the places with its names: layers of one site, or addresses."""
    sites = {a.site for a in vectors.addresses}
    layers = [a.layer for a in vectors.addresses if a.layer is not None and a.unit is None]
    if len(sites) == 1 and len(layers) == len(vectors.addresses):
        return "layer", list(layers)
    return "address", [str(a) for a in vectors.addresses]


def _about(
    y: Bool[Tensor, "text"], group: Int[Tensor, "text"], parts: Sequence[Fold], vectors: TextVectors
) -> dict[str, object]:
    shown, groups = int(y.sum()), len(group.unique())
    return {
        "texts": {"with": shown, "without": len(y) - shown, "groups": groups},
        "folds": len(parts),
        "addresses": [str(a) for a in vectors.addresses],
        "interval": f"95 % over {groups} groups",
    }
