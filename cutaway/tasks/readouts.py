"""Readouts: what is measured of a run, one number per prompt; a row of `READOUTS`, or a function of the user's own.

A task's metric is a readout: by its name, as a row, or any function (logits [batch token], answers, foils) → [batch],
which records call a user function. A new one is one row: `register(Readout("margin", margin, "logits", True, "…"))`.

One sign convention for all: **higher is more answer**. So `kl` and `rank` are negative distances with 0 as their best.
Answers and foils are token ids, one per prompt, or a set per prompt (a second axis, filled up with −1). A set counts by
its total probability, so `logit_diff` of two sets is the log odds between them, of two tokens their logit difference.
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
class Readout:
    """One row: a function of the logits at the last token of each prompt.

    Attributes:
        name: the word that names it, as in `metric="prob"` and `--task-metric prob`.
        function: takes logits [batch token], answers, foils and reference logits, and returns values [batch].
        unit: unit of the values.
        differentiable: True if gradients flow through it.
        says: what it is, for listings.
        needs_reference: True if it compares with the logits of the clean run.
    """

    name: str
    function: Callable[..., Tensor]
    unit: str
    differentiable: bool
    says: str
    needs_reference: bool = False

    def __call__(self, logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
        """Measure each prompt.

        Raises:
            Refused: it compares with reference logits and none were given, or it gave no number per prompt.
        """
        if self.needs_reference and reference is None:
            raise Refused(f"metric {self.name!r}", "it compares with the logits of another run", "give reference=…")
        values = self.function(logits.float(), answers, foils, reference)
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise Refused(f"metric {self.name!r}", f"it gave {got}", "return one number per prompt, a tensor [batch]")
        return values


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


READOUTS: dict[str, Readout] = {
    row.name: row
    for row in (
        Readout("logit_diff", logit_diff, "logits", True, "logit of the answer minus logit of the foil"),
        Readout("logit", logit, "logits", True, "logit of the answer, which has no zero that means anything"),
        Readout("log_prob", log_prob, "nats", True, "log-probability of the answer"),
        Readout("prob", prob, "probability", True, "probability of the answer"),
        Readout("prob_diff", prob_diff, "probability", True, "probability of the answer minus that of the foil"),
        Readout("kl", kl, "−nats", True, "minus the KL divergence from the clean run's prediction", True),
        Readout("rank", rank, "−places", False, "minus the number of tokens predicted more strongly than the answer"),
        Readout("accuracy", accuracy, "share", False, "whether the answer is the top prediction"),
    )
}


def register(row: Readout) -> Readout:
    """Enter a readout in the table, so that its name means it everywhere.

    Raises:
        Refused: another readout has this name.
    """
    if row.name in READOUTS:
        raise Refused(f"metric {row.name!r}", "another metric has that name", "rename it")
    READOUTS[row.name] = row
    return row


def readout(named: str | Readout | Callable[..., Tensor]) -> Readout:
    """Return the readout that a name, a row or a function means.

    Raises:
        Refused: no readout has that name.
    """
    if isinstance(named, Readout):
        return named
    if callable(named):
        return _of_user(named)
    if named not in READOUTS:
        close = nearest(named, READOUTS)
        why = "no metric has that name" + (f"; did you mean {close}?" if close else "")
        raise Refused(f"metric {named!r}", why, f"use one of: {', '.join(READOUTS)}")
    return READOUTS[named]


def _of_user(function: Callable[..., Tensor]) -> Readout:
    own = getattr(function, "__name__", type(function).__name__)

    def measure(logits: Tensor, answers: Tensor, foils: Tensor, reference: Tensor | None) -> Tensor:
        return function(logits, answers, foils)

    return Readout(f"user function {own}", measure, "user's unit", True, "a function of the user's own")


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
