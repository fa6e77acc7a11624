"""A truth as a stream of activations, so that whatever is trained on a model's activations can be trained on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch

from cutaway.core.record import hash_tensors
from cutaway.dictionaries.benchmarks.truth import Batches, Truth
from cutaway.streams.batch import Batch


class TruthStream:
    """Endless batches of a truth's activations at one site; every token is a document of its own.

    `restore(state())` on a stream made in the same way continues with the same bits.
    """

    def __init__(self, truth: Truth, tokens: int, *, seed: int = 0, site: str = "resid_post.0"):
        self.truth, self.site = truth, site
        self.batches: Batches = truth.batches(tokens, seed=seed)

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of the activations by address."""
        return {self.site: self.truth.d}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        number, n = self.batches.number, self.batches.tokens
        self.batches.number += 1
        x, _ = self.batches.batch(number)
        zeros = torch.zeros(n, dtype=torch.long)
        own = torch.arange(n) + number * n
        return Batch({self.site: x}, zeros, own, own, zeros, torch.ones(n, dtype=torch.bool))

    def state(self) -> dict[str, Any]:
        """Return the cursor."""
        return dict(self.batches.state())

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go to where `state` was taken.

        Raises:
            Refused: the cursor of another stream.
        """
        self.batches.restore(dict(state))
        return self

    def identity(self) -> dict[str, Any]:
        """Return the truth and the settings that the activations are drawn from."""
        weights = hash_tensors({"directions": self.truth.directions, "probability": self.truth.law.probability})
        return {"truth": self.truth.about, "weights": weights, **self.state(), "site": self.site}
