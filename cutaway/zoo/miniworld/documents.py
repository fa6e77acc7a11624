"""The world's text as numbered documents, without end, for streams of activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

from cutaway.zoo.miniworld.corpus import SECOND_STAGE, document
from cutaway.zoo.miniworld.world import World


@dataclass(frozen=True, eq=False)
class WorldDocuments:
    """Documents of the training mixture, each a function of the seed and its number; nothing held out is among them."""

    world: World
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=lambda: SECOND_STAGE)

    def read(self, first: int) -> Iterator[str]:
        """Yield the documents from number `first` on."""
        kinds = {k: w for k, w in self.weights.items() if w > 0 and k != "random_tokens"}  # those are no text
        for number in count(first):
            rng = Random(f"{self.seed}:{number}")
            yield document(self.world, rng, rng.choices(list(kinds), list(kinds.values()))[0])

    def identity(self) -> dict[str, Any]:
        """Return the identity of the documents, JSON-ready."""
        return {
            "kind": "world documents",
            "seed": self.seed,
            "people": len(self.world.people),
            "weights": dict(self.weights),
        }
