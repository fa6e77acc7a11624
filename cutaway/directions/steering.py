"""Steering: changes of activations that are made at a strength, and those of chosen prompts alone.

A direction is one, and so is a set of a dictionary's latents (`features.contrast`); `steer` and `complete` take any.

    edits = ca.directions.ConditionalSteering(refusal, found.condition("resid_post.1")).add(-2.0)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.content import content
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.repeat import Made
from cutaway.models.edits.conditional import Condition, Conditional
from cutaway.models.edits.edit import Edit
from cutaway.models.model import Model


class Steering(ABC):
    """Change of activations that is made at a strength; strength 0 changes nothing.

    Attributes:
        made: how it can be opened again; None if it is in no file.
    """

    made: Made | None

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """The addresses that `along` reads."""

    @abstractmethod
    def check(self, model: Model) -> None:
        """Check that a model has what is steered.

        Raises:
            Refused: it does not, or is of another width there.
        """

    @abstractmethod
    def add(self, strength: float = 1.0, positions: Sequence[int] | None = None) -> list[Any]:
        """Return the edits of a strength; negative ones steer the other way."""

    @abstractmethod
    def random(self, samples: int, seed: int = 0) -> list[Any]:
        """Return random steering of the same size, the control."""

    @abstractmethod
    def along(self, acts: Mapping[str, Float[Tensor, "text position width"]]) -> Float[Tensor, "text position"]:
        """Return how much of it activations have, in units of what strength 1 adds."""

    @abstractmethod
    def amounts(self) -> dict[str, float]:
        """Return the size of what strength 1 adds, by the name of each part."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return the entries of it in the record of a result."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""

    def opened(self, dictionary: str | None = None, device: torch.device | str = "cpu") -> Self:
        """Return it with what it needs beside its file, on a device.

        Args:
            dictionary: words that open its dictionary, where that is not where it was.
            device: the device.

        Raises:
            Refused: it has no dictionary, and one is given.
        """
        if dictionary is not None:
            raise Refused(Keyword("direction_dictionary", dictionary), "no latents are steered", "leave it out")
        return self


@dataclass(frozen=True)
class ConditionalSteering(Steering):
    """Steering of those prompts alone that satisfy a condition (CAST, Lee et al. 2024, arXiv:2409.05907).

    Its random control acts on the same prompts.

    Attributes:
        steering: what is done to them.
        condition: the condition.
        made: how it can be opened again.
    """

    steering: Steering
    condition: Condition
    made: Made | None = field(default=None, repr=False, compare=False)

    @property
    def reads(self) -> tuple[str, ...]:
        return self.steering.reads

    def check(self, model: Model) -> None:
        self.steering.check(model)
        model.places([self.condition.address])

    def add(self, strength: float = 1.0, positions: Sequence[int] | None = None) -> list[Edit]:
        return [Conditional(self.steering.add(strength, positions), self.condition)]

    def random(self, samples: int, seed: int = 0) -> list[ConditionalSteering]:
        return [ConditionalSteering(drawn, self.condition) for drawn in self.steering.random(samples, seed)]

    def along(self, acts: Mapping[str, Tensor]) -> Float[Tensor, "text position"]:
        return self.steering.along(acts)

    def amounts(self) -> dict[str, float]:
        return self.steering.amounts()

    def identity(self) -> dict[str, Any]:
        c = self.condition
        limits = {n: v for n, v in (("min", c.min), ("max", c.max)) if v is not None}
        return self.steering.identity() | {"condition": {"address": str(c.address), **limits, "hash": content(c)}}

    def sizes(self) -> dict[str, int]:
        return self.steering.sizes()
