"""Can a concept be read from few latents, and is that better than reading it without a dictionary?

Sparse probing (Gurnee et al. 2023, arXiv:2305.01610; SAEBench, arXiv:2503.09532): activations of a text are averaged
over its tokens; of the training texts, the k coordinates with the largest |mean of positives − mean of negatives| are
chosen and a logistic probe is fitted on them; its accuracy is measured on other texts. The same is done with

* the latents of the dictionary, and of random dictionaries with the same norms and L0,
* the neurons (coordinates) of the site and its principal components,
* a plain linear probe on all coordinates at once, whatever k is: what a dictionary would have to beat,
* the more frequent class.

Several concepts are averaged. Intervals: over held-out texts. Control: the same with shuffled training labels, beside
random dictionaries. Cost: one forward per text (a text longer than 96 tokens is read in parts), and one logistic
regression per concept, method, k and null sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.record import machine, versions
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval, share_interval
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.controls import principal, random_dictionaries
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence, encode_evidence
from cutaway.dictionaries.evaluation.reading import CONTEXT, of_texts
from cutaway.dictionaries.evaluation.scores import control_generator
from cutaway.interventions.probes import choose, logistic
from cutaway.models.model import Model
from cutaway.tasks.labelled import Labelled

KS = (1, 2, 5, 20)


@dataclass(frozen=True, kw_only=True)
class Probing(Result, kind="dictionary_probing"):
    """Held-out accuracy of probes by what they read and how many coordinates of it; concepts averaged."""

    accuracy: Float[Tensor, "method k"]
    interval: Float[Tensor, "method k bound"]
    null: Float[Tensor, "method k sample"]
    each: Float[Tensor, "method k concept"]


@method(
    answers="Can a concept be read from few latents, and is that better than reading it without a dictionary?",
    paper="Gurnee et al. 2023, arXiv:2305.01610",
    cost="(texts + bytes // 64) * F",
    control="shuffled_labels",
    rung="observational",
)
def probing(
    model: Model,
    dictionary: Dictionary,
    evidence: Evidence,
    labelled: Labelled,
    /,
    *,
    ks: tuple[int, ...] = KS,
    random: int = 2,
    samples: int = 2,
    seed: int = 0,
) -> Probing:
    """Probe concepts on labelled texts, from a dictionary's latents and from what else there is.

    The evidence is what random dictionaries are fitted on.

    Args:
        ks: numbers of coordinates that a probe may read.
        random: number of random dictionaries with the same norms and L0.
        samples: number of shuffles of the training labels for the null.
        seed: seed of random dictionaries, of the split of the texts and of the shuffles.

    Raises:
        Refused: a concept is on one side of the split only, or a probe would read nothing.
    """
    if min(ks) < 1:
        raise Refused(Call("dictionaries.probing", {"ks": ks}), "a probe of no coordinates reads nothing", "start at 1")
    others = random_dictionaries(dictionary, evidence.parted()[0], random, seed)
    return probing_on(model, dictionary, labelled, others, ks=ks, samples=samples, seed=seed)


def probing_on(
    model: Model,
    dictionary: Dictionary,
    labelled: Labelled,
    random: Sequence[Dictionary],
    *,
    context: int = CONTEXT,
    ks: Sequence[int] = KS,
    samples: int = 2,
    seed: int = 0,
) -> Probing:
    """Probe concepts on labelled texts, read in contexts of some length, beside these random dictionaries."""
    sites = tuple(dict.fromkeys((*dictionary.reads, *dictionary.writes)))
    evidence = of_texts(model, sites, labelled.texts, context)
    beside = [encode_evidence(d, evidence) for d in random]
    encoded = encode_evidence(dictionary, evidence)
    found = probing_of(encoded, labelled.shown, random=beside, ks=ks, samples=samples, seed=seed)
    return replace(found, labels=found.labels | {"concept": list(labelled.concepts)})


def probing_of(
    encoded: EncodedEvidence,
    labels: Bool[Tensor, "text concept"],
    *,
    random: Sequence[EncodedEvidence] = (),
    ks: Sequence[int] = KS,
    train: float = 0.75,
    samples: int = 2,
    seed: int = 0,
) -> Probing:
    """Probe concepts from a dictionary's latents and from what else there is.

    Args:
        encoded: a dictionary on evidence with `sequence`: one sequence a text.
        labels: True where a text (in the order of the sequence numbers) shows a concept.
        random: random dictionaries on the same evidence.
        ks: numbers of coordinates that a probe may read.
        train: share of the texts that probes are fitted on.
        samples: number of shuffles of the training labels for the null.
        seed: seed of the split and the shuffles.

    Raises:
        Refused: the evidence has no texts or another number of them, or a concept is on one side of the split only.
    """
    groups = _texts(encoded, labels)
    g = control_generator(seed)
    order = torch.randperm(len(labels), generator=g)
    cut = round(train * len(labels))
    fit, test = order[:cut], order[cut:]
    _two_sided(labels, fit, test)
    read = _readings(encoded, random, groups, fit)
    methods = [*read, "linear probe", "frequent class"]
    hits = torch.zeros(len(methods), len(ks), labels.shape[1], len(test))
    null = torch.zeros(len(methods), len(ks), labels.shape[1], samples)
    for c, y in enumerate(labels.unbind(1)):
        shuffled = [y[fit][torch.randperm(len(fit), generator=g)] for _ in range(samples)]
        for m, name in enumerate(methods):
            x = read.get(name, read["neurons"])
            for i, k in enumerate(ks):
                if i and name in ("linear probe", "frequent class"):
                    hits[m, i, c], null[m, i, c] = hits[m, 0, c], null[m, 0, c]
                    continue
                hits[m, i, c] = _correct(name, x, y, y[fit], fit, test, k)
                null[m, i, c] = torch.tensor([_correct(name, x, y, s, fit, test, k).mean() for s in shuffled])
    by_text = hits.mean(2)
    alone = labels.shape[1] == 1  # of one concept a text is right or wrong
    rows = by_text.movedim(-1, 0)
    spread = share_interval(rows) if alone else mean_interval(rows, within=(0.0, 1.0))
    return Probing(
        accuracy=by_text.mean(-1),
        interval=spread,
        null=null.mean(2),
        each=hits.mean(-1),
        labels={"method": methods, "k": [str(k) for k in ks], "bound": BOUNDS},
        units=dict.fromkeys(("accuracy", "interval", "null", "each"), "probability"),
        record={
            "dictionary": encoded.dictionary.fingerprint(),
            "texts": {"train": len(fit), "test": len(test)},
            "interval": f"95 % over {len(test)} held-out texts",
            "null": "shuffled training labels",
            "versions": versions(),
            "machine": machine(),
        },
    )


def pooled(code: SparseCode, groups: Int[Tensor, "token"]) -> Float[Tensor, "text latent"]:
    """Average the code over the tokens of every text."""
    n = int(groups.max()) + 1
    count = torch.bincount(groups, minlength=n)[:, None]
    cell = groups[code.tokens.cpu()] * code.n_latents + code.index.reshape(-1).cpu()
    flat = torch.zeros(n * code.n_latents).index_add_(0, cell, code.value.reshape(-1).float().cpu())
    return flat.reshape(n, -1) / count


def _correct(
    name: str, x: Tensor, y: Tensor, taught: Tensor, fit: Tensor, test: Tensor, k: int
) -> Float[Tensor, "text"]:
    """Return the held-out texts that a probe gets right which was fitted with the labels `taught`."""
    if name == "frequent class" or taught.all() or not taught.any():
        return (y[test] == (taught.float().mean() > 0.5)).float()
    columns = torch.arange(x.shape[1]) if name == "linear probe" else choose(x[fit], taught, k)
    probe = logistic(x[fit][:, columns], taught, 0.1 if name == "linear probe" else 1.0)
    return (torch.from_numpy(probe.predict(x[test][:, columns].double().numpy())) == y[test]).float()


def _texts(encoded: EncodedEvidence, labels: Tensor) -> Int[Tensor, "token"]:
    if encoded.evidence.sequence is None:
        raise Refused(
            "probing single tokens", "the evidence has no sequences", "give evidence with one sequence a text"
        )
    groups = encoded.evidence.sequence.unique(return_inverse=True)[1].cpu()
    if int(groups.max()) + 1 != len(labels):
        raise Refused(f"labels of {len(labels)} texts", f"the evidence has {int(groups.max()) + 1}", "one row a text")
    return groups


def _readings(
    encoded: EncodedEvidence, random: Sequence[EncodedEvidence], groups: Tensor, fit: Tensor
) -> Mapping[str, Tensor]:
    """Return what the probes may read of every text; principal components come from the training texts."""
    site = encoded.dictionary.reads[0]
    x = encoded.evidence.of(site).float().cpu()
    n = int(groups.max()) + 1
    mean = torch.zeros(n, x.shape[1]).index_add_(0, groups, x) / torch.bincount(groups, minlength=n)[:, None]
    centre, rows = principal(mean[fit])
    found = {"latents": pooled(encoded.code, groups), "neurons": mean, "pca": (mean - centre) @ rows.T}
    return found | {f"random {i}": pooled(r.code, groups) for i, r in enumerate(random)}


def _two_sided(labels: Tensor, fit: Tensor, test: Tensor) -> None:
    for part, name in ((fit, "training"), (test, "held-out")):
        share = labels[part].float().mean(0)
        if not len(part) or bool(((share == 0) | (share == 1)).any()):
            raise Refused(
                f"probing {labels.shape[1]} concepts",
                f"among the {name} texts one is always or never there",
                "give more texts, or leave that concept out",
            )
