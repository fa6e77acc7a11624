"""The examples of largest key in each of many slots, offered in any order and in any parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

Examples = tuple[Tensor, Tensor, Tensor]  # place [n], value [n], window [n offset]


@dataclass
class Best:
    """Examples of each slot, the largest keys first. Keys are different numbers ≥ 0, and −1 where a place is empty.

    As keys decide alone, any order of offers and merges ends with the same examples.

    Attributes:
        key: the keys.
        place: where the examples stand in the corpus.
        value: their activations.
        window: the activations around each, as multiples of its own.
    """

    key: Int[Tensor, "slot rank"]
    place: Int[Tensor, "slot rank"]
    value: Float[Tensor, "slot rank"]
    window: Float[Tensor, "slot rank offset"]

    @classmethod
    def empty(cls, slots: int, size: int, width: int, device: torch.device | str = "cpu") -> Self:
        """Return slots without examples."""
        shape = (slots, size)
        return cls(
            torch.full(shape, -1, device=device),
            torch.full(shape, -1, device=device),
            torch.zeros(shape, device=device),
            torch.zeros(*shape, width, dtype=torch.float16, device=device),
        )

    @property
    def size(self) -> int:
        """The number of examples that a slot has room for."""
        return self.key.shape[1]

    def grow(self, slots: int) -> None:
        """Add empty slots up to a number."""
        if slots > len(self.key):
            more = Best.empty(slots - len(self.key), self.size, self.window.shape[2], self.key.device)
            for f in fields(self):
                setattr(self, f.name, torch.cat([getattr(self, f.name), getattr(more, f.name)]))

    def offer(
        self,
        slot: Int[Tensor, "row"],
        key: Int[Tensor, "row candidate"],
        number: Int[Tensor, "row candidate"],
        take: Callable[[Int[Tensor, "n"]], Examples],
    ) -> None:
        """Keep the best of what different slots have and of candidates.

        Args:
            slot: slots that are offered something.
            key: keys of the candidates, −1 for none.
            number: numbers by which `take` knows the candidates.
            take: returns place, value and window of those that are kept.
        """
        best, at = torch.cat([self.key[slot], key], 1).topk(self.size, 1)
        fresh = (at >= self.size) & (best >= 0)
        old = at.clamp(max=self.size - 1)
        new = take(number.gather(1, (at - self.size).clamp(min=0))[fresh])
        self.key[slot] = best
        for name, values in zip(("place", "value", "window"), new, strict=True):
            held = getattr(self, name)
            index = old if held.ndim == 2 else old[..., None].expand(-1, -1, held.shape[2])
            moved = held[slot].gather(1, index)
            moved[fresh] = values.to(moved.dtype)
            held[slot] = moved

    def rows(self, slots: Int[Tensor, "row"]) -> Self:
        """Return some slots in an order."""
        return type(self)(*(getattr(self, f.name)[slots] for f in fields(self)))

    def merge(self, slot: Int[Tensor, "row"], other: Best) -> None:
        """Keep the best of the own examples and another's; row i of the other goes to the slot `slot[i]`."""
        number = torch.arange(other.key.numel(), device=other.key.device).view_as(other.key)

        def take(n: Tensor) -> Examples:
            return other.place.flatten()[n], other.value.flatten()[n], other.window.flatten(0, 1)[n]

        self.offer(slot, other.key, number, take)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {prefix + f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Self:
        """Return what `tensors` was taken of."""
        return cls(*(tensors[prefix + f.name] for f in fields(cls)))
