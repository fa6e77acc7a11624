"""A second metric beside a task's own, such as the answer's probability: two numbers a row, in one reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.tasks.bound import Bound
from cutaway.tasks.readouts import readout

Measure = Callable[[Float[Tensor, "row token"], Int[Tensor, "row"]], Float[Tensor, "row 2"]]


def with_probability(bound: Bound) -> Measure:
    """The task's metric and the probability of the answer."""
    return beside(bound, "prob")


def beside(bound: Bound, name: str) -> Measure:
    """The task's metric and the one called `name`, as the executor asks for them."""
    other = replace(bound, readout=readout(name))

    def measure(logits: Tensor, prompt: Tensor) -> Tensor:
        return torch.stack([b.metric_at(logits, prompt) for b in (bound, other)], dim=-1).float()

    return measure


def subject_or_changed(bound: Bound) -> tuple[Tensor, str]:
    """Columns of each prompt's subject [batch position], or where a pair names none, of the tokens its corruption
    changes; and which of the two it is, in words."""
    subject = bound.span("subject")
    named = subject.any(1)
    says = "the subject" if bool(named.all()) else "the tokens that the corruption changes"
    if bool(named.any()) and not bool(named.all()):
        says = "the subject; where a pair names none, " + says
    return torch.where(named[:, None], subject, bound.changed), says
