"""Directions that were selected: candidates of a behaviour by position and layer, with their effects when edited."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.core.refuse import Code, Refused
from cutaway.core.result import Result
from cutaway.directions.direction import Direction, direction


@dataclass(frozen=True, kw_only=True)
class SelectedDirection(Result, kind="selected_direction"):
    """Candidate directions of a behaviour by position and layer, and the one that passes the filters and bypasses most.

    Attributes:
        bypass: the behaviour's score on texts with the concept, with the candidate ablated everywhere.
        interval: 95 %, over texts.
        null: the same with random directions.
        induce: the score on texts without the concept, with the candidate added at its layer.
        induce_interval: 95 %, over texts.
        induce_null: the same with random directions of the same length.
        kl: from the plain next token of texts without the concept to that under ablation, in nats.
        kl_interval: 95 %, over texts.
        kl_null: the same with random directions.
        plain: the score without edits, on texts with the concept and without.
        plain_interval: 95 %, over texts.
        passes: True where a candidate passes the three filters.
        vector: the candidates, zero where the classes do not differ.
        midpoint: the component along the unit vector half way between the class means.
        concept: the name of the concept.
        family: the family of the model.
        best: position and layer of the candidate that is selected; empty if none passes.
        groups: groups of the texts that candidates were found and selected on.
    """

    page = ("induce", "kl")
    bypass: Float[Tensor, "position layer"]
    interval: Float[Tensor, "position layer bound"]
    null: Float[Tensor, "position layer sample"]
    induce: Float[Tensor, "position layer"]
    induce_interval: Float[Tensor, "position layer bound"]
    induce_null: Float[Tensor, "position layer sample"]
    kl: Float[Tensor, "position layer"]
    kl_interval: Float[Tensor, "position layer bound"]
    kl_null: Float[Tensor, "position layer sample"]
    plain: Float[Tensor, "class"]
    plain_interval: Float[Tensor, "class bound"]
    passes: Bool[Tensor, "position layer"]
    vector: Float[Tensor, "position layer width"]
    midpoint: Float[Tensor, "position layer"]
    concept: str
    family: str
    best: tuple[int, ...]
    groups: tuple[str, ...]

    def direction(self, position: int | None = None, layer: int | None = None) -> Direction:
        """Return the selected direction, or the candidate at a position and layer, at the input of its block.

        Raises:
            Refused: none was selected, no such candidate, or one where the classes do not differ.
        """
        if position is None or layer is None:
            if not self.best:
                why = "no candidate passes all filters: see `bypass`, `induce` and `kl`"
                raise Refused(f"the direction of {self.concept!r}", why, Code("name one: direction(position, layer)"))
            position, layer = self.best
        own = self.select(position=position, layer=layer)
        address = f"resid_pre.{layer}"
        found = direction({address: own.vector[0, 0]}, self.concept, self.concept, f"not {self.concept}", self.family)
        about = {n: self.record[n] for n in ("subjects", "options", "versions") if n in self.record}
        record = {"position": position, "groups": list(self.groups), **about}
        return replace(found, midpoint=own.midpoint[0], record=record)

    def at(self, position: str | None = None, *addresses: str) -> Direction:
        """Return the selected direction, or the candidate that a position and an address name in words.

        Raises:
            Refused: one of the two is missing, or what `direction` refuses.
        """
        if position is None and not addresses:
            return self.direction()
        known = {f"resid_pre.{i}": i for i in self.labels["layer"]}
        layers = [known.get(a, -1) for a in addresses]
        if position is None or len(layers) != 1 or layers[0] < 0 or not position.lstrip("-").isdigit():
            why = f"{position or 'no position'} at {', '.join(addresses) or 'no address'} names none of the candidates"
            raise Refused(f"the direction of {self.concept!r}", why, "name both: -1 and resid_pre.5")
        return self.direction(int(position), layers[0])
