"""Does a probe on a dictionary's latents add anything to probes that need no dictionary?

All probes see the same texts, activations and folds. What counts is not the best probe afterwards but the one that
validation would choose: with the latents among the arrows of the quiver, or without them (Kantamneni et al. 2025,
arXiv:2502.16681). Folds are groups of texts, such as templates; validation divides the groups of the training texts.

* `gain`: AUROC of the quiver with the probes on latents − that of the quiver without; `gain_interval`: 95 %, over
  folds.
* `auroc[probe]`: mean over folds; `interval`: 95 %, over folds. `validation[probe]`: what the choice is made by.
* Without a dictionary: difference of means, logistic, logistic on principal components, nearest neighbours, a
  perceptron, and an attention probe, which weighs the tokens itself.
* On latents: logistic on the 1, 4, 16 and 64 whose means differ most on the training texts, and on all with an L1
  penalty.
* For understanding, in no quiver: logistic on the `reconstruction` and on the `error` that it leaves; counts of tokens
  without a model; a random direction. `lost` is AUROC of the activations − that of the reconstruction, both by the
  logistic probe.
* Control: the whole protocol with shuffled labels (`null`, `gain_null`).
* Assumption: groups differ in what must not be read. With groups that share words, counts of tokens do as well.
* Known failures: where all probes are right, nothing is shown; choose a harder site or concept. Few folds give wide
  intervals. A probe on one latent that is worse may still be easier to understand.
* Cost: one forward per text, and several fits per probe, fold and null sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.progress import advance
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.evidence import encode_evidence
from cutaway.dictionaries.evaluation.reading import of_texts
from cutaway.interventions import probe_kinds
from cutaway.interventions.probes import Fold, Scorer, auroc, bag_of_tokens, folds, logistic_scores
from cutaway.models.model import Model
from cutaway.tasks.labelled import Labelled

_INNER = 3  # folds of validation
_KS = (1, 4, 16, 64)


@dataclass(frozen=True)
class Contender:
    """A probe that takes part.

    Attributes:
        reads: what it reads of a text: vectors, tokens, latents, reconstruction, error or words.
        scorer: fits it, given a seed.
        quiver: `dense` or `dictionary`; empty if it is in none.
    """

    reads: str
    scorer: Callable[[int], Scorer]
    quiver: Literal["dense", "dictionary", ""] = ""


#: every probe by its name
CONTENDERS: dict[str, Contender] = {
    "mean difference": Contender("vectors", lambda seed: probe_kinds.mean_difference_scores, "dense"),
    "logistic": Contender("vectors", lambda seed: logistic_scores(), "dense"),
    "16 components": Contender("vectors", lambda seed: probe_kinds.component_scores(16), "dense"),
    "neighbours": Contender("vectors", lambda seed: probe_kinds.neighbour_scores(), "dense"),
    "perceptron": Contender("vectors", lambda seed: probe_kinds.mlp_scores(seed=seed), "dense"),
    "attention": Contender("tokens", lambda seed: probe_kinds.attention_scores(), "dense"),
    **{
        f"{k} latent{'s' * (k > 1)}": Contender("latents", lambda seed, k=k: probe_kinds.sparse_scores(k), "dictionary")
        for k in _KS
    },
    "all latents": Contender("latents", lambda seed: probe_kinds.lasso_scores(), "dictionary"),
    "reconstruction": Contender("reconstruction", lambda seed: logistic_scores()),
    "error": Contender("error", lambda seed: logistic_scores()),
    "words": Contender("words", lambda seed: logistic_scores()),
    "random direction": Contender("vectors", probe_kinds.random_direction_scores),
}


@dataclass(frozen=True, kw_only=True)
class Quiver(Result, kind="probe_quiver"):
    """AUROC of probes with and without a dictionary on the same folds, and what the dictionary adds to a choice.

    Attributes:
        auroc: of each probe on held-out groups.
        interval: of `auroc`, 95 %, over folds.
        null: `auroc` with shuffled labels.
        validation: AUROC on folds of the training texts, by which quivers choose.
        gain: AUROC of the quiver with probes on latents − that without.
        gain_interval: of `gain`, 95 %, over folds.
        gain_null: `gain` with shuffled labels.
        with_dictionary: AUROC of the quiver with all probes.
        without_dictionary: AUROC of the quiver of probes that need no dictionary.
        lost: AUROC of the logistic probe on activations − that on their reconstruction.
        lost_interval: of `lost`, 95 %, over folds.
        concept: the name of the concept.
        chosen: the probe that the whole quiver chose on each fold.
        latent: the latent of the probe on one, chosen on all texts.
    """

    page = ("gain", "lost")
    auroc: Float[Tensor, "probe"]
    interval: Float[Tensor, "probe bound"]
    null: Float[Tensor, "probe sample"]
    validation: Float[Tensor, "probe"]
    gain: Float[Tensor, ""]
    gain_interval: Float[Tensor, "bound"]
    gain_null: Float[Tensor, "sample"]
    with_dictionary: Float[Tensor, ""]
    without_dictionary: Float[Tensor, ""]
    lost: Float[Tensor, ""] | None
    lost_interval: Float[Tensor, "bound"] | None
    concept: str
    chosen: tuple[str, ...]
    latent: int


@method(
    answers="Does a probe on a dictionary's latents add anything to probes that need no dictionary?",
    paper="Kantamneni et al. 2025, arXiv:2502.16681",
    cost="(texts + bytes // 64) * F",
    control="shuffled_labels",
    rung="observational",
)
def quiver(
    model: Model,
    dictionary: Dictionary,
    labelled: Labelled,
    /,
    *,
    reading: Literal["mean", "last"] = "mean",
    probes: tuple[str, ...] = tuple(CONTENDERS),
    concept: str | None = None,
    samples: int = 1,
    seed: int = 0,
) -> Quiver:
    """Compare probes on a dictionary's latents with probes that need no dictionary, on the same folds.

    Args:
        reading: the mean over the tokens of a text without special ones, or its last token.
        probes: the probes that take part, some without the dictionary and some on its latents.
        concept: the concept; None means the first.
        samples: number of shuffles of the labels.
        seed: seed of the folds, the shuffles and the perceptron.

    Raises:
        Refused: one class or one group only, an empty text, an unknown concept or probe, a quiver without a probe, or
            a dictionary of several sites.
    """
    _check(probes)
    c = labelled.concept(concept)
    y, group = labelled.shown[:, c].cpu(), labelled.group_of
    parts = folds(y, group, seed=seed)
    parts = [(fit, test) for fit, test in parts if 0 < int(y[test].sum()) < len(test)]
    if len(parts) < 2:
        why = "fewer than two folds of whole groups have texts of both classes to test on"
        raise Refused(f"probes on {len(y)} texts", why, "give more groups with both classes")
    read = _read(model, dictionary, labelled, reading)
    g = generator(seed)
    shuffled = [y[torch.randperm(len(y), generator=g)] for _ in range(samples)]
    real, *null = (
        _run(read, probes, labels, group, parts, seed, (i, 1 + samples)) for i, labels in enumerate((y, *shuffled))
    )
    lost = _lost(real.test, probes)
    return Quiver(
        auroc=real.test.nanmean(0),
        interval=mean_interval(real.test, within=(0.0, 1.0)),
        null=torch.stack([n.test.nanmean(0) for n in null], -1),
        validation=real.validation.nanmean(0),
        gain=real.gain.mean(),
        gain_interval=mean_interval(real.gain, within=(-1.0, 1.0)),
        gain_null=torch.stack([n.gain.mean() for n in null]),
        with_dictionary=real.best.mean(),
        without_dictionary=(real.best - real.gain).mean(),
        lost=None if lost is None else lost.mean(),
        lost_interval=None if lost is None else mean_interval(lost, within=(-1.0, 1.0)),
        concept=labelled.concepts[c],
        chosen=real.chosen,
        latent=int((read["latents"][y].mean(0) - read["latents"][~y].mean(0)).abs().argmax()),
        labels={"probe": list(probes), "bound": BOUNDS},
        units=dict.fromkeys(_FIELDS if lost is None else (*_FIELDS, "lost"), "AUROC"),
        reasons=dict.fromkeys(("validation", "with_dictionary", "without_dictionary"), "a part of what `gain` is of"),
        record={
            "site": dictionary.reads[0],
            "texts": {"with": int(y.sum()), "without": int((~y).sum()), "groups": len(group.unique())},
            "interval": f"95 % over {len(parts)} folds",
            "quivers": {q: [n for n, row in CONTENDERS.items() if row.quiver == q] for q in ("dense", "dictionary")},
        },
    )


_FIELDS = ("auroc", "validation", "gain", "with_dictionary", "without_dictionary")


def _check(probes: Sequence[str]) -> None:
    """Refuse probes that do not exist, or none on one side."""
    if wrong := [n for n in probes if n not in CONTENDERS]:
        raise Refused(Keyword("probes", wrong[0]), "there is no such probe", f"use {', '.join(CONTENDERS)}")
    for side in ("dense", "dictionary"):
        if all(CONTENDERS[n].quiver != side for n in probes):
            own = ", ".join(n for n, row in CONTENDERS.items() if row.quiver == side)
            why = f"none of them is {'on latents' if side == 'dictionary' else 'without the dictionary'}"
            raise Refused(Keyword("probes", ",".join(probes)), why, f"add one of {own}")


def _lost(test: Float[Tensor, "fold probe"], probes: Sequence[str]) -> Float[Tensor, "fold"] | None:
    """Return AUROC of the activations − that of their reconstruction, where both take part."""
    if not {"logistic", "reconstruction"} <= set(probes):
        return None
    return test[:, probes.index("logistic")] - test[:, probes.index("reconstruction")]


@dataclass(frozen=True)
class _Run:
    """The protocol on one set of labels.

    Attributes:
        test: AUROC on the held-out texts of each fold.
        validation: AUROC on folds of its training texts.
        best: AUROC of the whole quiver's choice.
        gain: the same − that of the quiver without the dictionary.
        chosen: the whole quiver's choices.
    """

    test: Float[Tensor, "fold probe"]
    validation: Float[Tensor, "fold probe"]
    best: Float[Tensor, "fold"]
    gain: Float[Tensor, "fold"]
    chosen: tuple[str, ...]


def _read(model: Model, dictionary: Dictionary, labelled: Labelled, reading: str) -> Mapping[str, Tensor]:
    """Return what each probe reads of every text."""
    if len(dictionary.reads) != 1 or dictionary.writes != dictionary.reads:
        why = f"it reads {', '.join(dictionary.reads)} and writes {', '.join(dictionary.writes)}"
        raise Refused("probes beside a dictionary", why, "give an autoencoder of one site")
    (site,) = dictionary.reads
    evidence = of_texts(model, (site,), labelled.texts)
    assert evidence.sequence is not None
    assert evidence.ids is not None
    present, text = evidence.sequence.cpu().unique(return_inverse=True)
    if len(present) != len(labelled.texts):
        missing = next(i for i in range(len(labelled.texts)) if i not in present)
        raise Refused(f"text {missing}: {labelled.texts[missing]!r}", "no token of it is left", "leave it out")
    encoded = encode_evidence(dictionary, evidence)
    x, out = evidence.of(site).float().cpu(), encoded.output[site].float()
    ids = [evidence.ids.cpu()[text == i].tolist() for i in range(len(present))]
    each = {"vectors": x, "latents": encoded.code.dense().float(), "reconstruction": out, "error": x - out}
    pooled = {n: _pooled(t, text, reading) for n, t in each.items()}
    return {**pooled, "tokens": _padded(x, text), "words": bag_of_tokens(ids)}


def _pooled(x: Float[Tensor, "token width"], text: Int[Tensor, "token"], reading: str) -> Float[Tensor, "text width"]:
    count = torch.bincount(text)
    if reading == "last":
        last = torch.full_like(count, -1).scatter_reduce(0, text, torch.arange(len(text)), "amax")
        return x[last]
    return x.new_zeros(len(count), x.shape[1]).index_add_(0, text, x) / count[:, None]


def _padded(x: Float[Tensor, "token width"], text: Int[Tensor, "token"]) -> Float[Tensor, "text position width"]:
    """Return the tokens of each text in order, with NaN behind them."""
    rows = [x[text == i] for i in range(int(text.max()) + 1)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)


def _run(
    read: Mapping[str, Tensor],
    probes: tuple[str, ...],
    y: Bool[Tensor, "text"],
    group: Int[Tensor, "text"],
    parts: Sequence[Fold],
    seed: int,
    turn: tuple[int, int],
) -> _Run:
    """Fit every probe on every fold and on the folds of its validation; `turn` is the number of the run, and of all."""
    test, validation = (torch.full((len(parts), len(probes)), torch.nan) for _ in range(2))
    inner = [_validation(y[fit], group[fit], seed) for fit, _ in parts]
    for i, name in enumerate(probes):
        row = CONTENDERS[name]
        x, scorer = read[row.reads], row.scorer(seed)
        for f, (fit, held) in enumerate(parts):
            test[f, i] = _auroc(x, y, fit, held, scorer)
            own = [_auroc(x[fit], y[fit], a, b, scorer) for a, b in inner[f]]
            validation[f, i] = torch.stack(own).nanmean() if own else torch.nan
        advance(turn[0] * len(probes) + i + 1, turn[1] * len(probes))
    every, dense = (_chosen(validation, probes, own) for own in (("dense", "dictionary"), ("dense",)))
    rows = torch.arange(len(parts))
    best = test[rows, every]
    return _Run(test, validation, best, best - test[rows, dense], tuple(probes[i] for i in every.tolist()))


def _chosen(
    validation: Float[Tensor, "fold probe"], probes: Sequence[str], quivers: Sequence[str]
) -> Int[Tensor, "fold"]:
    """Return the probe of some quivers that validation chooses on each fold, the first of equals."""
    outside = torch.tensor([CONTENDERS[n].quiver not in quivers for n in probes])
    return validation.nan_to_num(-1.0).masked_fill(outside, -2.0).argmax(1)


def _validation(y: Bool[Tensor, "text"], group: Int[Tensor, "text"], seed: int) -> list[Fold]:
    try:
        return folds(y, group, _INNER, seed)
    except Refused:  # one class or one group is left: nothing to choose by
        return []


def _auroc(x: Tensor, y: Tensor, fit: Tensor, held: Tensor, scorer: Scorer) -> Float[Tensor, ""]:
    if bool(y[held].all()) or not bool(y[held].any()):
        return torch.tensor(torch.nan)
    return auroc(scorer(x[fit], y[fit][None], x[held])[0], y[held])
