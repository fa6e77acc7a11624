"""Sources with an exact cursor: the protocol of all that training reads, and batches of held items in random order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.stats import generator


@runtime_checkable
class Source(Protocol):
    """Batches with an exact cursor: `restore(state())` on a source made in the same way continues with the same bits.

    A source may also say `epoch`, how often it had been handed out before the last batch, and `moments()` of its sites.
    """

    def __iter__(self) -> Iterator[Any]: ...

    def state(self) -> dict[str, Any]:
        """Return the cursor, JSON-ready: after the batches handed out so far."""
        ...

    def restore(self, state: Mapping[str, Any]) -> Any:
        """Go to where `state` was taken."""
        ...


class Rounds:
    """Cursor over held items: batches of their indices, shuffled again in each round, without end.

    A source inherits from it and turns `indices()` into batches.

    Attributes:
        items: how many items there are.
        size: items per batch.
        seed: seed of the order.
        number: batches handed out so far.
    """

    SIZE = "batch"  # the name of `size` in a state

    def __init__(self, items: int, size: int, seed: int):
        self.items, self.size, self.seed, self.number = items, size, seed, 0

    def __iter__(self) -> Self:
        return self

    def indices(self) -> Int[Tensor, "item"]:
        """Return the items of the next batch."""
        number, at = divmod(self.number, self.items // self.size)
        order = torch.randperm(self.items, generator=generator(self.seed * 1_000_003 + number))
        self.number += 1
        return order[at * self.size : (at + 1) * self.size]

    @property
    def epoch(self) -> int:
        """Number of full rounds before the last batch."""
        return max(0, self.number - 1) // (self.items // self.size)

    def state(self) -> dict[str, Any]:
        """Return the cursor."""
        return {"number": self.number, self.SIZE: self.size, "seed": self.seed}

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go to where `state` was taken.

        Raises:
            Refused: the state of a source with another batch size or seed.
        """
        check_same(state, {self.SIZE: self.size, "seed": self.seed})
        self.number = int(state["number"])
        return self


def check_same(state: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Refuse a cursor whose source was made otherwise."""
    other = [f"{n} {state.get(n)}, here {v}" for n, v in made.items() if state.get(n) != v]
    if other:
        raise Refused("a cursor", f"it is of another source: {'; '.join(other)}", "make the source as it was made then")
