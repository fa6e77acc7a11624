"""Alternative values of writers: what stands in for what they write where an edge is cut.

Every score, mask and evaluation of a circuit takes them from here, so that two numbers that name the same alternative
mean the same. The kinds are those of ablation (`interventions.ablation_values`), of which `corrupt` also serves the
other direction: clean values put into the corrupt run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Keyword, Refused
from cutaway.interventions.ablation_values import SAYS, Baseline, removal
from cutaway.interventions.paired_runs import Direction, first_changed
from cutaway.models.access.capture import Activations
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.bound import Bound


@dataclass(frozen=True)
class Alternatives:
    """Values that stand in for writers' in a run whose edges are cut.

    Use `alternatives` to make it, and `part` for the values of some prompts.

    Attributes:
        bound: the prompts, without those that the kind cannot serve.
        kind: the kind of values.
        direction: noise cuts edges of the clean run, denoise edges of the corrupt run.
        places: the places of the writers.
        since: the first position at which any value differs from the run's own.
        says: entries of a record.
        stands: for each donor the values of all prompts; empty where they are those of the other run.
    """

    bound: Bound
    kind: Baseline
    direction: Direction
    places: tuple[Address, ...]
    since: int
    says: dict[str, Any]
    stands: tuple[Activations, ...] = ()

    @property
    def target(self) -> Tokens:
        """The prompts of the run whose edges are cut."""
        return self.bound.corrupt if self.direction == "denoise" else self.bound.clean

    @property
    def sign(self) -> float:
        """The sign that makes a change of the metric by cutting an edge the worth of the edge's clean value."""
        return 1.0 if self.direction == "denoise" else -1.0

    def part(self, model: Model, rows: Sequence[int]) -> tuple[Activations, ...]:
        """Return the values of some prompts, in the padding of the whole, for each donor."""
        some = self.bound.rows(rows)
        if not self.stands:
            giver = some.clean if self.direction == "denoise" else some.corrupt
            return (model.capture(giver, list(self.places), logits=False),)
        pick = torch.tensor(list(rows))

        def taken(x: Tensor) -> Tensor:
            return x if len(rows) == len(x) else x[pick.to(x.device)]

        return tuple(Activations({a: taken(s[str(a)]) for a in self.places}, some.clean) for s in self.stands)

    def record(self) -> dict[str, Any]:
        """Return the entries of a record beyond the options."""
        return self.says | {"sign": "positive is more answer"}


def alternatives(
    model: Model,
    bound: Bound,
    places: Sequence[Address],
    kind: Baseline,
    direction: Direction = "noise",
    corruption: str = "",
    seed: int = 0,
) -> Alternatives:
    """Find the alternative values at some places for the prompts of a task.

    Raises:
        Refused: values that these prompts do not allow, or a direction that they do not have.
    """
    places = tuple(places)
    if kind == "corrupt":
        says = {"stands in": SAYS[kind] if direction == "noise" else "the value in the clean prompt"}
        says |= {"corruption": corruption} if corruption else {}
        return Alternatives(bound, kind, direction, places, first_changed(model, bound), says)
    if direction == "denoise":
        why = "only the other run of a pair can bring an answer back"
        raise Refused(Keyword("direction", direction), why, ("use it with ", Keyword("how", "corrupt")))
    found = removal(model, bound, places, kind, seed)
    return Alternatives(found.bound, kind, direction, places, found.since, found.says, found.stands)
