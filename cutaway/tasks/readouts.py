"""Readouts: what is measured of a run, one number per prompt; a row of `READOUTS`, or a function of the user's own.

A task's metric is a readout: by its name, as a row, or any function (logits [batch token], answers, foils) → [batch],
which records call a user function. A new one is one row: `register(Readout("margin", margin, "logits", True, "…"))`.

Most read the logits after the last token. Others say what they read instead: `reads="logits"` the logits at every
position, `reads="resid_post.5"` (or several addresses) activations. Their function gets those as `Activations`, whose
`tokens` are the prompts that ran, and a run ends at the deepest place that is read. `activation` makes such a row.

One sign convention for all: **higher is more answer**. So `kl`, `rank` and `cross_entropy` are negative distances with
0 as their best.
Answers and foils are token ids, one per prompt, or a set per prompt (a second axis, filled up with −1). A set counts by
its total probability, so `logit_diff` of two sets is the log odds between them, of two tokens their logit difference.
Answers of several tokens have forms of these metrics of their own: `tasks.continuations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address, parse
from cutaway.core.record import hash_tensors
from cutaway.core.refuse import Code, Refused, nearest
from cutaway.models.access.capture import Activations
from cutaway.models.access.reading import Continued, Reads
from cutaway.models.anatomy.norms import wide

LAST_LOGITS = "last_logits"
Logits = Float[Tensor, "batch token"]
Values = Float[Tensor, "batch"]
Answers = Int[Tensor, "batch"] | Int[Tensor, "batch choice"]  # of a whole answer: its tokens, "batch step"
Foils = Int[Tensor, "batch"] | Int[Tensor, "batch wrong"]


@dataclass(frozen=True)
class Readout:
    """A row of the table of readouts: a function of what a run shows.

    Attributes:
        name: the word that names it, as in `metric="prob"` and `--task-metric prob`.
        function: takes what it reads, answers, foils and reference logits, and returns values [batch]. What it reads
            are logits [batch token] at the last token of each prompt, or else `Activations`.
        unit: unit of the values.
        differentiable: True if gradients flow through it.
        says: what it is, for listings.
        needs_reference: True if it compares with the last logits of the clean run.
        reads: `last_logits`, `logits` at every position, or an address or several (`resid_post.5`, `z.9.6`).
        whole_answer: True if prompts run with their answer behind them, so that all of its tokens count. `answers` are
            then these tokens in their order [batch step], filled up with −1.
        continuations: True if answer and foil stand behind their prompts as continuations, see `tasks.continuations`.
        of_choices: True if of the last logits it reads those of answers and foils alone, so that a sweep need not
            compute the others. It is then called with these logits, and with answers and foils as columns of them.
    """

    name: str
    function: Callable[..., Tensor]
    unit: str
    differentiable: bool
    says: str
    needs_reference: bool = False
    reads: str | Address | Sequence[str | Address] = LAST_LOGITS
    whole_answer: bool = False
    continuations: bool = False
    of_choices: bool = False

    def __post_init__(self) -> None:
        """Refuse addresses that are none, and a comparison with the last logits that reads others."""
        if self.needs_reference and not (self.last_logits or self.continuations):
            why = "what it compares with are the last logits of the clean run"
            raise Refused(f"readout {self.name!r} of {self.reads}", why, "leave one of the two out")
        if self.whole_answer and self.last_logits:
            why = "the last logits are those after the answer"
            raise Refused(f"readout {self.name!r} of a whole answer", why, "read the logits at every position")
        if self.of_choices and not self.last_logits:
            why = "it does not read last logits"
            raise Refused(f"readout {self.name!r} of choices", why, "leave it out")
        _ = self.reading

    @property
    def last_logits(self) -> bool:
        """True if it reads the logits after each prompt's last token."""
        return self.reads == LAST_LOGITS

    @property
    def reading(self) -> Reads:
        """The part of a run that it is measured on."""
        if self.last_logits:
            return Reads()
        if self.continuations:
            return Reads(False, (), True)
        given = [self.reads] if isinstance(self.reads, str | Address) else list(self.reads)
        return Reads(False, tuple(dict.fromkeys(parse(a).place for a in given)))

    def __call__(
        self, read: Logits | Activations | Continued, answers: Answers, foils: Foils, reference: Logits | None = None
    ) -> Values:
        """Measure each prompt.

        Raises:
            Refused: it compares with reference logits and none were given, or it gave no number per prompt.
        """
        if self.needs_reference and reference is None:
            raise Refused(
                f"metric {self.name!r}", "it compares with the logits of another run", Code("give reference=…")
            )
        values = self.function(read.float() if isinstance(read, Tensor) else read, answers, foils, reference)
        if not isinstance(values, Tensor) or values.shape != answers.shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise Refused(f"metric {self.name!r}", f"it gave {got}", "return one number per prompt, a tensor [batch]")
        return values


def logit_diff(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Return the logit of the answer minus logit of the foil: their log odds."""
    return _pooled(logits, answers) - _pooled(logits, foils)


def logit(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Return the logit of the answer; of a set, the log of the sum of its exponentials."""
    return _pooled(logits, answers)


def log_prob(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Log-probability of the answer."""
    return _pooled(logits.log_softmax(-1), answers)


def prob(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Return the probability of the answer."""
    return log_prob(logits, answers, foils).exp()


def prob_diff(logits: Logits, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Return the probability of the answer minus probability of the foil (Hanna et al. 2023, on sets)."""
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


def cross_entropy(acts: Activations, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Minus the mean cross-entropy of each prompt's own tokens, predicted from those before them."""
    tokens = acts.tokens
    if bool((tokens.lengths < 2).any()):
        raise Refused("metric 'cross_entropy'", "a prompt of one token predicts none of its own", "use longer prompts")
    logits = acts["logits"].float()
    ids, mask = tokens.ids.to(logits.device), tokens.prompt.to(logits.device)
    said = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    both = mask[:, 1:] & mask[:, :-1]  # the predicting and the predicted token are real
    return said.where(both, 0.0).sum(1) / both.sum(1)


def sequence_log_prob(acts: Activations, answers: Answers, foils: Foils, reference: Logits | None = None) -> Values:
    """Log-probability of all tokens of the answer, each after those before it."""
    logits = acts["logits"].float()
    steps = answers.to(logits.device)  # [batch step]
    given = steps >= 0
    first = acts.tokens.last.to(logits.device) - given.sum(1)  # the column that predicts the answer's first token
    columns = (first[:, None] + torch.arange(steps.shape[1], device=logits.device)).clamp_max(logits.shape[1] - 1)
    rows = torch.arange(len(steps), device=logits.device)[:, None]
    said = logits[rows, columns].log_softmax(-1).gather(-1, steps.clamp_min(0)[..., None])[..., 0]
    return said.where(given, 0.0).sum(1)


def activation(address: str | Address, direction: Tensor | None = None) -> Readout:
    """Return the readout of an activation along a direction: Σ direction · activation, in the direction's own length.

        ca.Task("subject", pairs, metric=ca.tasks.activation("resid_post.5@-1", probe))

    Without a position in the address it is the mean over each prompt's tokens. Without a direction the address names
    one neuron or channel (`mlp_post.2.17@-1`).

    Raises:
        Refused: no such site; when it is measured, a direction of another shape than the activation.
    """
    a = parse(address)
    along = "" if direction is None else f" along {hash_tensors({'direction': direction})[:8]}"

    def measure(acts: Activations, answers: Answers, foils: Foils, reference: Tensor | None) -> Tensor:
        x = wide(acts[a])
        lead = 1 if a.position is not None or not a.row.has_position else 2
        if direction is not None and x.shape[lead:] == direction.shape:
            x = (x * direction.to(x.device, x.dtype)).flatten(lead).sum(-1)
        elif direction is not None or x.ndim > lead:
            given = "no direction was given" if direction is None else f"the direction is {tuple(direction.shape)}"
            why = f"the activation is {tuple(x.shape[lead:])} and {given}"
            raise Refused(f"readout of {a}", why, "give a direction of that shape, or name one unit")
        return x if lead == 1 else mean_over_tokens(x, acts)

    says = "the activation along a direction" if along else "the activation of one unit"
    return Readout(f"{a}{along}", measure, "activation", True, says, reads=a.place)


def mean_over_tokens(x: Float[Tensor, "batch position"], acts: Activations) -> Values:
    """Return the mean over the real tokens of each prompt."""
    mask = acts.tokens.prompt.to(x.device)
    return x.where(mask, 0.0).sum(1) / mask.sum(1)


READOUTS: dict[str, Readout] = {
    row.name: row
    for row in (
        Readout(
            "logit_diff", logit_diff, "logits", True, "logit of the answer minus logit of the foil", of_choices=True
        ),
        Readout(
            "logit",
            logit,
            "logits",
            True,
            "logit of the answer, which has no zero that means anything",
            of_choices=True,
        ),
        Readout("log_prob", log_prob, "nats", True, "log-probability of the answer"),
        Readout("prob", prob, "probability", True, "probability of the answer"),
        Readout("prob_diff", prob_diff, "probability", True, "probability of the answer minus that of the foil"),
        Readout("kl", kl, "−nats", True, "minus the KL divergence from the clean run's prediction", True),
        Readout("rank", rank, "−places", False, "minus the number of tokens predicted more strongly than the answer"),
        Readout("accuracy", accuracy, "share", False, "whether the answer is the top prediction"),
        Readout(
            "cross_entropy",
            cross_entropy,
            "−nats",
            True,
            "minus the mean cross-entropy of the prompt's own tokens",
            reads="logits",
        ),
        Readout(
            "sequence_log_prob",
            sequence_log_prob,
            "nats",
            True,
            "log-probability of an answer of any number of tokens",
            reads="logits",
            whole_answer=True,
        ),
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
