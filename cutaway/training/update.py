"""The protocol of what a training loop trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from cutaway.training.ranks import Ranks

if TYPE_CHECKING:
    from cutaway.training.loop import Loop


@runtime_checkable
class Update(Protocol):
    """Protocol of what is trained: weights, their optimizer, and sums for the log.

    Write `step`, `report`, `state` and `restore`; the other methods have a default for classes that inherit from this
    one. Each method gets the loop, which has the plan, `step`, `tokens` and `seconds` so far, `note` and `log`.

    Attributes:
        kind: what is trained, written into checkpoints.
        ranks: the processes over which the update is spread; None for one process.
    """

    kind: str = "training"
    ranks: Ranks | None = None

    def begin(self, loop: Loop) -> None:
        """Start a fresh run; `loop.peek()` reads batches ahead that are trained on later. Not called on resume."""
        return

    def step(self, batch: Any, loop: Loop) -> int:
        """Learn from a batch and return its tokens; `loop.step` and `loop.tokens` count those before it."""
        ...

    def after_step(self, loop: Loop) -> None:
        """Do what follows a step once it is counted and logged."""
        return

    def report(self, loop: Loop) -> list[dict[str, Any]]:
        """Lines for the log about the steps since the last report; the loop adds step, tokens, speed and forecast."""
        ...

    def settings(self, loop: Loop) -> dict[str, Any]:
        """JSON-ready settings that must be equal when a checkpoint is taken up; they are part of its record."""
        return {"plan": loop.plan.as_dict()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on: tensors by name, and JSON-ready data by name."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], loop: Loop) -> None:
        """Take up an earlier `state`; the record has the settings as well."""
        ...
