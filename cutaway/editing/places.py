"""Requests as tokens of one model: prompts in several contexts, where their subjects end, and the objects behind them.

A request's prompt stands alone and behind other texts ("contexts"), so that what is found for it does not hang on the
beginning of a document. Contexts are the first words of texts that the caller gives, not samples from the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.editing.request import Request
from cutaway.models.model import Model
from cutaway.models.spacing import forms
from cutaway.models.tokens import Tokens
from cutaway.tasks.answers import whole_answers
from cutaway.tasks.prompts import Prompts

CONTEXTS = 4  # texts before a prompt, beside none
ESSENCE = "{} is a"  # the prompt on which an edit shall change little, as published
_WORDS = 10  # of a context
_TRIED = 4  # tokens on which the matrix is compared with what the MLP writes


def contexts(texts: Prompts, n: int, seed: int) -> tuple[str, ...]:
    """Return the empty context and the first words of `n` texts drawn at random."""
    usable = [t for t in texts if t.strip()]
    drawn = torch.randperm(len(usable), generator=generator(seed))[:n].tolist()
    return ("", *(" ".join(usable[i].split()[:_WORDS]).rstrip(".") + ". " for i in drawn))


@dataclass(frozen=True)
class Placed:
    """A text in several contexts, as tokens, with the place where its subject ends.

    Attributes:
        tokens: a row per context, the bare text first.
        last: the position of the subject's last token in each row.
    """

    tokens: Tokens
    last: Int[Tensor, "row"]


@dataclass(frozen=True)
class Case:
    """A request in one model.

    Attributes:
        request: the request.
        prompt: its prompt in every context.
        essence: "{subject} is a" alone.
        new: the tokens of the new object.
    """

    request: Request
    prompt: Placed
    essence: Placed
    new: list[int]


def cases(model: Model, requests: Sequence[Request], before: Sequence[str]) -> list[Case]:
    """Return requests as tokens.

    Raises:
        Refused: an object that merges with the end of its prompt, a subject whose end no token marks, or a text that is
            too long.
    """
    objects = whole_answers(
        model, [r.prompt for r in requests], [forms(r.prompt, r.new)[0] for r in requests], "new object"
    )
    found = []
    for r, new in zip(requests, objects, strict=True):
        essence = ESSENCE.format(r.subject)
        prompt = _placed(model, r.prompt, r.subject, before)
        found.append(Case(r, prompt, _placed(model, essence, r.subject, ("",)), new))
    return found


def _placed(model: Model, text: str, subject: str, before: Sequence[str]) -> Placed:
    """Place a text behind contexts; the subject's end keeps its distance from the end of the text."""
    tokens = model.tokens([context + text for context in before])
    bare = tokens.row(0)
    at = bare.find(0, subject)[-1]
    n = int(tokens.lengths[0])
    ids = bare.ids[0, at:].tolist()
    last = tokens.lengths.cpu() - (n - at)
    for i, p in enumerate(last.tolist()):
        if tokens.row(i).ids[0, p:].tolist() != ids:
            why = f"behind {before[i]!r} its tokens from the subject's end on are others"
            raise Refused(f"prompt {text!r}", why, "end the subject at the end of a word")
    return Placed(tokens, last)


@dataclass(frozen=True)
class Layer:
    """The output map of an MLP as an associative memory: keys are what it reads, values what it writes.

    Attributes:
        model: the model.
        layer: the layer.

    Raises:
        Refused: no such layer, a family without one such matrix, or whose MLP's output is not that of the matrix.
    """

    model: Model
    layer: int

    def __post_init__(self) -> None:
        n = self.model.shape.n_layers
        if not 0 <= self.layer < n:
            raise Refused(f"an edit at layer {self.layer}", f"layers go from 0 to {n - 1} here", "choose another layer")
        self.model.places([self.reads, self.writes])
        one = self.model.tokens(torch.arange(_TRIED)[None])
        seen = self.model.capture(one, [self.reads, self.writes], logits=False)
        wrote = seen[str(self.writes)].double()
        off = (self.through(seen[str(self.reads)]) - wrote).norm() / wrote.norm().clamp_min(1e-12)
        if not float(off) <= 0.05:
            why = "what its MLP adds to the residual stream is scaled or normed behind the matrix"
            raise Refused(
                f"an edit at layer {self.layer} of {self.model.name}",
                why,
                "edit a family whose MLPs write into the stream",
            )

    @property
    def weight(self) -> str:
        """The name of the matrix among `model.weights`."""
        return f"mlp_out.{self.layer}"

    @property
    def reads(self) -> Address:
        """The place of keys."""
        return Address("mlp_post", self.layer)

    @property
    def writes(self) -> Address:
        """The place of values."""
        return Address("mlp_out", self.layer)

    @cached_property
    def matrix(self) -> Float[Tensor, "d_mlp d_model"]:
        """The matrix, inputs first, in float64."""
        return self.model.weights.mlp_out[self.layer].detach().double()

    def through(self, keys: Float[Tensor, "*row d_mlp"]) -> Float[Tensor, "*row d_model"]:
        """Return what the matrix and its bias make of keys, in float64."""
        return keys.double() @ self.matrix + self.model.weights.mlp_out_bias[self.layer].detach().double()

    def keys(self, cases: Sequence[Case]) -> Float[Tensor, "d_mlp case"]:
        """Return the key of each request: the mean over contexts at the subject's end, in float64."""
        means = [at_subject(self.model, c.prompt, self.reads).mean(0) for c in cases]
        return torch.stack(means, 1)


def at_subject(model: Model, placed: Placed, place: Address) -> Float[Tensor, "row width"]:
    """Return the activation at the subject's last token in every context, in float64."""
    x = model.capture(placed.tokens, place, logits=False)[str(place)]
    rows = torch.arange(len(x), device=x.device)
    columns = placed.tokens.column(0) + placed.last.to(x.device)
    return x[rows, columns].double()
