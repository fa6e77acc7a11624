"""Texts of repeated blocks, of the induction model and of its twin, with an exact cursor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.core.stats import generator

WORDS, LENGTH = 64, 48
SHORTEST, LONGEST = 12, 24
CYCLES = (20, 21, 23)
_SEEDS = 1 << 20  # batches of one seed


class Texts:
    """Batches of texts [batch, LENGTH]; the batch of a step depends on the seed and the step alone.

    Attributes:
        batch: number of texts.
        twin: True for blocks that are the same in all texts.
        seed: of the texts.
        step: batches so far.
    """

    def __init__(self, batch: int, twin: bool, seed: int):
        self.batch, self.twin, self.seed, self.step = batch, twin, seed, 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Int[Tensor, "batch position"]:
        g = generator(self.seed * _SEEDS + self.step)
        self.step += 1
        return cycles(self.batch, g) if self.twin else blocks(self.batch, g)

    def state(self) -> dict[str, Any]:
        """Return the cursor."""
        return {"step": self.step}

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go to where `state` was taken."""
        self.step = state["step"]
        return self


def blocks(n: int, g: torch.Generator) -> Int[Tensor, "batch position"]:
    """Return texts of a random block each, said again and again."""
    words = torch.rand(n, WORDS, generator=g).argsort(1)
    length = torch.randint(SHORTEST, LONGEST + 1, (n, 1), generator=g)
    return words.gather(1, torch.arange(LENGTH) % length)


def cycles(n: int, g: torch.Generator) -> Int[Tensor, "batch position"]:
    """Return texts that go round a fixed cycle from a random word on."""
    follower = followers()
    words = [torch.randint(WORDS, (n,), generator=g)]
    while len(words) < LENGTH:
        words.append(follower[words[-1]])
    return torch.stack(words, 1)


def followers() -> Int[Tensor, "word"]:
    """Return the word that follows each word in the texts of the twin."""
    out = torch.empty(WORDS, dtype=torch.long)
    for cycle in torch.randperm(WORDS, generator=generator(0)).split(CYCLES):
        out[cycle] = cycle.roll(-1)
    return out
