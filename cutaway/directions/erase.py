"""Can a concept still be read after it was erased, and what else changes?

Erasers are fitted on some groups of texts, at their last tokens. On the erased vectors of the same texts a linear and
an MLP probe are trained again, and both are tested on erased vectors of the other groups. LEACE is the least change
after which no linear probe beats a constant on the texts that it was fitted on (Belrose et al. 2023,
arXiv:2306.03819); it promises nothing about other probes, or about later layers.

* `linear[eraser, address]`: AUROC of the retrained linear probe, over held-out groups; 0.5 is chance. `interval`: 95 %,
  over groups. `mlp`, `mlp_interval`: the same of a perceptron with a hidden layer.
* Erasers: `none`, which is before; `projection` along the difference of means; `affine`, which sets that component to
  its mean; `leace`; `rank`: as many directions of probes, one after another (INLP); `mean`: the whole vector becomes
  the mean, after which nothing is left to read.
* `moved`: the share of the vectors' variance that the eraser changes, ‖x' − x‖² / ‖x − μ‖² over held-out texts.
* `kl`: KL(plain ‖ erased) of the next token where the eraser, fitted on all texts, edits the last position; in nats,
  mean over texts.
* Control: linear probes trained on the same erased vectors with shuffled labels (`null`).
* Known failures: of the miniworld's sentiment an MLP reads as much after LEACE as before. With fewer texts than
  coordinates the directions that are fitted on some groups miss a part of the concept in others, so that a retrained
  probe finds the rest. Where erased vectors hold nothing, scores are ties or noise. `projection` moves all vectors
  towards 0, which may lie outside of what later layers have seen.
* Equivalences (tests): LEACE equals x − W⁺ P W (x − μ) to 1e-6; of vectors with equal spread in all directions it is
  `affine`; after `projection` the component is exactly 0.
* Cost: of each text, one forward to read it, one plain and one per eraser and address, from that address on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Pattern
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator
from cutaway.interventions.erasure import ERASERS, Eraser
from cutaway.interventions.probe_kinds import mlp_scores
from cutaway.interventions.probes import (
    Fold,
    auroc,
    auroc_interval,
    folds,
    logistic_scores,
)
from cutaway.interventions.text_vectors import text_vectors
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.labelled import Labelled

_NONE = "none"
_ROUNDING = 1e-5  # of a coordinate's spread: what is left of it after float32


@dataclass(frozen=True, kw_only=True)
class Erasure(Result, kind="erasure"):
    """Probes trained again on vectors with a concept erased, and the cost of erasing it.

    Attributes:
        linear: AUROC of linear probes on held-out groups.
        interval: 95 %, over groups.
        null: the same of probes trained on shuffled labels.
        mlp: AUROC of perceptrons on held-out groups.
        mlp_interval: 95 %, over groups.
        moved: share of the vectors' variance that is changed.
        kl: from the next token's plain distribution to the one after erasure.
        concept: the concept that was erased.
    """

    linear: Float[Tensor, "eraser address"]
    interval: Float[Tensor, "eraser address bound"]
    null: Float[Tensor, "eraser address sample"]
    mlp: Float[Tensor, "eraser address"]
    mlp_interval: Float[Tensor, "eraser address bound"]
    moved: Float[Tensor, "eraser address"]
    kl: Float[Tensor, "eraser address"]
    concept: str


@method(
    answers="Can a concept still be read after it was erased, and what else changes?",
    paper="Belrose et al. 2023, arXiv:2306.03819",
    cost="texts * (2 + eraser * address) * F",
    control="shuffled_labels",
    rung="interventional",
)
def erase(
    model: Model,
    labelled: Labelled,
    /,
    *,
    sites: tuple[Pattern, ...] = ("resid_post",),
    erasers: tuple[str, ...] = tuple(ERASERS),
    concept: str | None = None,
    rank: int = 4,
    samples: int = 3,
    seed: int = 0,
) -> Erasure:
    """Erase a concept at addresses in several ways, and train probes on what is left.

    Args:
        sites: addresses or sites whose values are vectors of one width.
        erasers: ways to erase.
        concept: the concept; None means the first.
        rank: number of directions that the eraser `rank` takes out.
        samples: number of shuffles of the labels.
        seed: seed of the folds, the shuffles and the perceptrons.

    Raises:
        Refused: one class or one group only, an unknown eraser, concept or site, or a model that predicts no token.
    """
    check_predicts(model)
    if wrong := [e for e in erasers if e not in ERASERS]:
        raise Refused(Keyword("erasers", wrong[0]), "nothing is erased so", f"use {', '.join(ERASERS)}")
    c = labelled.concept(concept)
    y, group, g = labelled.shown[:, c].cpu(), labelled.group_of, generator(seed)
    read = text_vectors(model, labelled.texts, sites, ["last"])
    shuffled = torch.stack([y[torch.randperm(len(y), generator=g)] for _ in range(samples)])
    trial = _Trial(y, group, folds(y, group, seed=seed), shuffled, rank, seed)
    names = [_NONE, *erasers]
    cells = [[trial.cell(name, x) for x in read.vectors[0]] for name in names]
    fitted = [
        (a, _fit(name, rank, x, y)) for name in names for a, x in zip(read.addresses, read.vectors[0], strict=True)
    ]
    tokens = model.tokens(list(labelled.texts))
    own = model.run_last(tokens).float().log_softmax(-1)

    def divergence(logits: Tensor, prompt: Tensor) -> Tensor:
        return (own[prompt].exp() * (own[prompt] - logits.float().log_softmax(-1))).sum(-1)

    kl = sweep(model, tokens, [[f.edit(a, (-1,))] if f else [] for a, f in fitted], divergence)
    fields: dict[str, Any] = {n: torch.stack([torch.stack([c[n] for c in row]) for row in cells]) for n in cells[0][0]}
    return Erasure(
        **fields,
        kl=kl.float().cpu().mean(1).unflatten(0, (len(names), -1)),
        concept=labelled.concepts[c],
        labels={"eraser": names, "address": list(map(str, read.addresses)), "bound": BOUNDS},
        units={"linear": "AUROC", "mlp": "AUROC", "moved": "share of variance", "kl": "nats"},
        record={"texts": {"with": int(y.sum()), "without": int((~y).sum()), "groups": len(group.unique())}},
    )


def _fit(name: str, rank: int, x: Float[Tensor, "text width"], y: Bool[Tensor, "text"]) -> Eraser | None:
    return None if name == _NONE else ERASERS[name](rank)(x, y)


@dataclass(frozen=True)
class _Trial:
    """Labels, groups and folds that erasers are fitted and probes trained and tested on."""

    y: Bool[Tensor, "text"]
    group: Int[Tensor, "text"]
    parts: Sequence[Fold]
    shuffled: Bool[Tensor, "sample text"]
    rank: int
    seed: int

    def cell(self, name: str, x: Float[Tensor, "text width"]) -> dict[str, Any]:
        """Return every field but `kl` of one eraser and address."""
        labels = torch.cat([self.y[None], self.shuffled])
        linear, mlp = torch.full((len(labels), len(x)), torch.nan), torch.full((1, len(x)), torch.nan)
        change = torch.zeros(2)
        for fit, test in self.parts:
            eraser = _fit(name, self.rank, x[fit], self.y[fit])
            erased = eraser(x) if eraser else x
            left = _without_rounding(erased, x)
            linear[:, test] = logistic_scores()(left[fit], labels[:, fit], left[test])
            mlp[:, test] = mlp_scores(seed=self.seed)(left[fit], labels[:1, fit], left[test])
            change += torch.stack([(erased - x)[test].square().sum(), (x[test] - x[fit].mean(0)).square().sum()])
        values = auroc(linear, self.y)
        return {
            "linear": values[0],
            "interval": auroc_interval(linear[0], self.y, self.group),
            "null": values[1:],
            "mlp": auroc(mlp[0], self.y),
            "mlp_interval": auroc_interval(mlp[0], self.y, self.group),
            "moved": change[0] / change[1],
        }


def _without_rounding(left: Float[Tensor, "text width"], x: Float[Tensor, "text width"]) -> Float[Tensor, "text width"]:
    """Return erased vectors with 0 in coordinates that only rounding varies, for probes scale them up."""
    return torch.where(left.std(0) > _ROUNDING * x.std(0), left, 0.0)
