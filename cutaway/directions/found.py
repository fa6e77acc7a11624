"""Directions that were found: of one concept, by several finders, at many addresses."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from cutaway.core.result import Result
from cutaway.directions.direction import Direction, direction


@dataclass(frozen=True, kw_only=True)
class FoundDirections(Result, kind="found_directions"):
    """Directions of a concept by finder, reading and address, with their held-out AUROC.

    Attributes:
        auroc: of texts of groups that the direction was not found on; NaN where the classes do not differ.
        interval: of `auroc`, 95 %, over groups.
        null: `auroc` of directions found with shuffled labels.
        cosine: with the difference of means at the same place.
        vector: the direction found on all texts; zero where the classes do not differ.
        midpoint: the component along the unit vector half way between the class means.
        concept: the name of the concept.
        family: the family of the model.
    """

    auroc: Float[Tensor, "finder reading address"]
    interval: Float[Tensor, "finder reading address bound"]
    null: Float[Tensor, "finder reading address sample"]
    cosine: Float[Tensor, "finder reading address"]
    vector: Float[Tensor, "finder reading address width"]
    midpoint: Float[Tensor, "finder reading address"]
    concept: str
    family: str

    def direction(self, finder: str | None = None, reading: str | None = None, *addresses: str) -> Direction:
        """Return the direction of one finder and reading, by default the first, at some addresses.

        Without addresses it is that at all where the classes differ.

        Raises:
            Refused: no such finder, reading or address, or one where the classes do not differ.
        """
        finder, reading = finder or self.labels["finder"][0], reading or self.labels["reading"][0]
        own = self.select(finder=finder, reading=reading)
        names = list(addresses) or [a for a, v in zip(own.labels["address"], own.vector[0, 0], strict=True) if v.any()]
        own = own.select(address=names)
        vectors = dict(zip(own.labels["address"], own.vector[0, 0], strict=True))
        found = direction(vectors, self.concept, self.concept, f"not {self.concept}", self.family)
        about = {n: self.record[n] for n in ("subjects", "options", "versions", "groups") if n in self.record}
        record = {"finder": finder, "reading": reading, **about}
        return replace(found, midpoint=own.midpoint[0, 0], record=record)
