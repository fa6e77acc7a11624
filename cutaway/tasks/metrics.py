"""Metrics: how strongly the last position's logits say the answer, one value a prompt.

One sign convention for all: **higher is more answer**. So `kl` and `rank` are negative distances with 0 as their best.
Answers and foils are token ids, one a prompt, or a set a prompt (a second axis, filled up with −1); a set counts by its
total probability, so `logit_diff` of two sets is the log odds between them, and of two tokens their logit difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused, nearest

Logits = Float[Tensor, "batch token"]
Values = Float[Tensor, "batch"]
Answers = Int[Tensor, "batch"] | Int[Tensor, "batch choice"]
Foils = Int[Tensor, "batch"] | Int[Tensor, "batch wrong"]


@dataclass(frozen=True)
class Metric:
    """One row: the function, the unit of its values, and what it can be used for."""

    name: str
    function: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    unit: str
    differentiable: bool
    says: str
    needs_reference: bool = False

    def __call__(self, logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
        """The metric of each prompt.

        Raises:
            Refused: the metric compares with reference logits, and none were given.
        """
        if self.needs_reference and reference is None:
            raise Refused(f"metric {self.name!r}", "it compares with the logits of another run", "give reference=…")
        return self.function(logits.float(), answers, foils, reference)


def logit_diff(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Logit of the answer minus logit of the foil: their log odds."""
    return _pooled(logits, answers) - _pooled(logits, foils)


def logit(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Logit of the answer; of a set, the log of the sum of its exponentials."""
    return _pooled(logits, answers)


def log_prob(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Log-probability of the answer."""
    return _pooled(logits.log_softmax(-1), answers)


def prob(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Probability of the answer."""
    return log_prob(logits, answers, foils).exp()


def prob_diff(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Probability of the answer minus probability of the foil (Hanna et al. 2023, on sets)."""
    return prob(logits, answers, foils) - prob(logits, foils, answers)


def kl(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Minus KL(reference ‖ logits): 0 where the two predict the same."""
    assert reference is not None
    target = reference.float().log_softmax(-1)
    return -(target.exp() * (target - logits.log_softmax(-1))).sum(-1)


def rank(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Minus the number of tokens predicted more strongly than the (best) answer: 0 is the top prediction."""
    return -(logits > _best(logits, answers)[:, None]).sum(-1).to(logits.dtype)


def accuracy(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """1 where no token outside the answer is predicted as strongly as the answer, else 0."""
    ids = _as_sets(answers)
    rest = logits.scatter(-1, ids.where(ids >= 0, ids[:, :1]), float("-inf"))
    return (_best(logits, answers) > rest.amax(-1)).to(logits.dtype)


METRICS: dict[str, Metric] = {
    row.name: row
    for row in (
        Metric("logit_diff", logit_diff, "logits", True, "logit of the answer minus logit of the foil"),
        Metric("logit", logit, "logits", True, "logit of the answer, which has no zero that means anything"),
        Metric("log_prob", log_prob, "nats", True, "log-probability of the answer"),
        Metric("prob", prob, "probability", True, "probability of the answer"),
        Metric("prob_diff", prob_diff, "probability", True, "probability of the answer minus that of the foil"),
        Metric("kl", kl, "−nats", True, "minus the KL divergence from the clean run's prediction", True),
        Metric("rank", rank, "−places", False, "minus the number of tokens predicted more strongly than the answer"),
        Metric("accuracy", accuracy, "share", False, "whether the answer is the top prediction"),
    )
}


def metric(name: str) -> Metric:
    """The row called `name`.

    Raises:
        Refused: no metric has that name.
    """
    if name not in METRICS:
        close = nearest(name, METRICS)
        why = "no metric has that name" + (f"; did you mean {close}?" if close else "")
        raise Refused(f"metric {name!r}", why, f"use one of: {', '.join(METRICS)}")
    return METRICS[name]


def _as_sets(ids: Tensor) -> Tensor:
    return ids[:, None] if ids.ndim == 1 else ids


def _chosen(scores: Tensor, ids: Tensor) -> Tensor:
    sets = _as_sets(ids).to(scores.device)
    return scores.gather(-1, sets.clamp_min(0)).masked_fill(sets < 0, float("-inf"))


def _pooled(scores: Tensor, ids: Tensor) -> Tensor:
    chosen = _chosen(scores, ids)
    return chosen[:, 0] if chosen.shape[1] == 1 else chosen.logsumexp(-1)


def _best(scores: Tensor, ids: Tensor) -> Tensor:
    return _chosen(scores, ids).amax(-1)
