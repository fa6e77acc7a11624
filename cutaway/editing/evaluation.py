"""Measurements of an edit: the answers to a request and to its probes, and the drift of everything else.

A prompt counts as answered where every token of the answer is the likeliest after those before it, and as preferring
it where the answer has more log-probability per token than the other object (the old one where the edit ought to change
the answer, the new one where it ought not). The first is the stricter; papers report the second (ES, PS, NS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.editing.request import KINDS, Requests
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.edits.rewrites import Rewrite, place_of
from cutaway.models.model import Model
from cutaway.models.spacing import forms
from cutaway.models.tokens import Tokens, continued
from cutaway.tasks.answers import whole_answers
from cutaway.tasks.continuations import accuracy, log_probs
from cutaway.tasks.prompts import Prompts

EFFICACY = "efficacy"
_ROWS = 128  # prompts of one batch


@dataclass(frozen=True)
class Asked:
    """Every prompt of some requests, with its answer and the other object, as tokens of a model.

    Attributes:
        tokens: the prompts.
        answers: the tokens of each answer.
        others: those of the other object; None where the request names none.
        request: the request of each prompt.
        measure: the entry of `measures` that each prompt counts for.
        measures: `efficacy` and the kinds of probes that occur.
    """

    tokens: Tokens
    answers: list[list[int]]
    others: list[list[int] | None]
    request: Int[Tensor, "asked"]
    measure: Int[Tensor, "asked"]
    measures: tuple[str, ...]

    def of(self, requests: Sequence[int]) -> list[int]:
        """Return the rows of some requests."""
        chosen = set(requests)
        return [i for i, r in enumerate(self.request.tolist()) if r in chosen]

    def means(self, values: Float[Tensor, "asked"], n: int) -> Float[Tensor, "request measure"]:
        """Return the mean over the prompts of each request and measure; NaN where it has none."""
        cells = self.request * len(self.measures) + self.measure
        known = ~values.isnan()
        sums = torch.zeros(n * len(self.measures)).index_add_(0, cells[known], values[known].float())
        counts = torch.bincount(cells[known], minlength=n * len(self.measures))
        return (sums / counts).unflatten(0, (n, -1))


def asked(model: Model, requests: Requests) -> Asked:
    """Return all prompts of the requests as tokens.

    Raises:
        Refused: an answer that merges with the end of its prompt.
    """
    rows = [
        (i, kind, prompt, answer, other)
        for i, r in enumerate(requests)
        for kind, prompt, answer, other in [
            (EFFICACY, r.prompt, r.new, r.old),
            *((p.kind, p.prompt, p.answer, r.old if KINDS[p.kind] else r.new) for p in r.probes),
        ]
    ]
    measures = tuple(k for k in (EFFICACY, *KINDS) if any(k == kind for _, kind, *_ in rows))
    prompts = [row[2] for row in rows]
    answers = whole_answers(model, prompts, [forms(p, a)[0] for _, _, p, a, _ in rows])
    named = [n for n, row in enumerate(rows) if row[4] is not None and row[4].strip() != row[3].strip()]
    said = [forms(prompts[n], str(rows[n][4]))[0] for n in named]
    found = dict(zip(named, whole_answers(model, [prompts[n] for n in named], said, "old object"), strict=True))
    return Asked(
        model.tokens(prompts),
        answers,
        [found.get(n) for n in range(len(rows))],
        torch.tensor([row[0] for row in rows]),
        torch.tensor([measures.index(row[1]) for row in rows]),
        measures,
    )


def answered(model: Model, asked: Asked, rows: Sequence[int]) -> Float[Tensor, "row 2"]:
    """Return for each prompt 1 or 0: it is answered, and it prefers the answer (NaN without another object)."""
    parts = [_answered(model, asked, rows[i : i + _ROWS]) for i in range(0, len(rows), _ROWS)]
    return torch.cat(parts)


def _answered(model: Model, asked: Asked, rows: Sequence[int]) -> Float[Tensor, "row 2"]:
    tokens = asked.tokens.rows(rows)
    answers, others = [asked.answers[i] for i in rows], [asked.others[i] or asked.answers[i] for i in rows]
    own, hit = _said(model, tokens, answers)
    other, _ = _said(model, tokens, others)
    better = (own > other).float()
    known = torch.tensor([asked.others[i] is not None for i in rows])
    return torch.stack([hit, torch.where(known, better, torch.nan)], 1)


def _said(
    model: Model, tokens: Tokens, objects: Sequence[list[int]]
) -> tuple[Float[Tensor, "row"], Float[Tensor, "row"]]:
    """Return the log-probability per token of an object behind each prompt, and 1 where it is the likeliest."""
    lengths = torch.tensor([len(o) for o in objects])

    def both(seen: Seen, prompt: Tensor) -> Tensor:
        read = seen.continuations
        assert read is not None
        none = torch.empty(0)
        return torch.stack([log_probs(read)[:, 0], accuracy(read, none, none).float()], 1)

    reads = Reads(last_logits=False, continuations=True)
    found = model.measure(continued(tokens, [[o] for o in objects]), Measure(both, reads)).float().cpu()
    return found[:, 0] / lengths, found[:, 1]


@dataclass(frozen=True)
class Drift:
    """Texts on which a model shall stay as it is, with its predictions there before any edit.

    Attributes:
        model: the model.
        tokens: the texts.
        before: its log-probabilities at every token.
    """

    model: Model
    tokens: Tokens
    before: Float[Tensor, "text position token"]

    @classmethod
    def on(cls, model: Model, texts: Prompts) -> Drift:
        """Run the model on the texts.

        Raises:
            Refused: texts that the model cannot read.
        """
        tokens = texts.bind(model)
        return cls(model, tokens, model.run(tokens).float().log_softmax(-1))

    def divergence(self) -> Float[Tensor, "text"]:
        """Return KL(before ‖ now) of each text, the mean over its tokens, in nats."""
        now = self.model.run(self.tokens).float().log_softmax(-1)
        each = (self.before.exp() * (self.before - now)).sum(-1)
        mask = self.tokens.mask.to(each.device)
        return ((each * mask).sum(1) / mask.sum(1)).cpu()


def random_twin(model: Model, rewrite: Rewrite, g: torch.Generator) -> Rewrite:
    """Return a random change of the same slice, with the same rank and Frobenius norm.

    Raises:
        Refused: a rewrite that does not fit the model.
    """
    old = place_of(model, rewrite).read()
    size = rewrite.delta_from(old).norm()
    tensors = [torch.randn(t.shape, generator=g, dtype=torch.float32) for t in rewrite.tensors().values()]
    drawn = tensors[0] @ tensors[1] if rewrite.factors is not None else tensors[0]
    by = float(size / drawn.double().norm())
    record = {"random twin of": rewrite.identity()}
    if rewrite.factors is not None:
        return replace(rewrite, factors=(tensors[0] * by, tensors[1]), record=record)
    return replace(rewrite, delta=tensors[0] * by, value=None, record=record)
