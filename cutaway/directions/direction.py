"""Directions: a vector per address of a model, saved with the record of its data.

found = ca.open("sentiment.safetensors")
model.generate(prompt, edits=found.add(4.0))
model.run_last(prompt, edits=found.at("resid_pre", "attn_out", "mlp_out", model=model).project_out())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.address import Address, parse
from cutaway.core.record import hash_tensors
from cutaway.core.refuse import Code, Refused
from cutaway.core.repeat import Made
from cutaway.core.result import Result
from cutaway.core.stats import generator
from cutaway.directions.steering import Steering
from cutaway.models.edits.conditional import Condition
from cutaway.models.edits.library import Add, Cap, Project
from cutaway.models.model import Model

_SELECTED = "select(address=…) the ones that are meant"


@dataclass(frozen=True, kw_only=True)
class Direction(Result, Steering, kind="direction"):
    """A direction of one name at one or several addresses, in the units of the activations there.

    Its labels name the addresses, its record says which data it comes from. Adding it moves activations towards
    `positive`, subtracting it towards `negative`.

    Attributes:
        vector: the vector at each address.
        midpoint: the component along the unit vector half way between the two classes, where that is known.
        name: the name.
        positive: the class that the vector points to.
        negative: the class that it points away from.
        family: the family of the model that it was found in.
        made: how it can be opened again; None if it is in no file.
    """

    vector: Float[Tensor, "address width"]
    midpoint: Float[Tensor, "address"] | None = None
    name: str = ""
    positive: str = ""
    negative: str = ""
    family: str = ""
    made: Made | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        what, named = self._what, self.labels.get("address", [])
        if len(named) != len(self.vector) or len(set(map(str, named))) < len(named):
            why = f"{len(self.vector)} vectors have the addresses {', '.join(map(str, named)) or 'none'}"
            raise Refused(what, why, Code('give labels={"address": […]}, a different address for each vector'))
        wrong = next((a for a in self.places if a.row.axes.split()[-1] not in _WIDTHS or not a.row.writable), None)
        if wrong is not None:
            raise Refused(f"{what} at {wrong}", f"its axes are {wrong.row.axes}", "use a site of vectors: resid_post.3")
        for address, vector in zip(self.places, self.vector, strict=True):
            if not bool(vector.isfinite().all()):
                raise Refused(f"{what} at {address}", "it has infinite or undefined entries", "find it again")
            if not bool(vector.any()):
                why = "it is zero: the two classes do not differ there, as where they share the token that is read"
                raise Refused(f"{what} at {address}", why, "leave that address out")

    @property
    def _what(self) -> str:
        return f"direction {self.name!r}" if self.name else "a direction"

    @property
    def places(self) -> tuple[Address, ...]:
        """The addresses, in order."""
        return tuple(parse(str(a)) for a in self.labels.get("address", []))

    @property
    def norm(self) -> Float[Tensor, "address"]:
        """Length of the vector at each address."""
        return self.vector.norm(dim=-1)

    def facts(self) -> dict[str, Any]:
        return {n: value for n, value in super().facts().items() if n != "made"}

    def identity(self) -> dict[str, Any]:
        """Return the name, addresses and hash of the vectors, for records."""
        return {"name": self.name, "addresses": list(map(str, self.places)), "hash": hash_tensors(tensors_of(self))}

    def unit(self) -> Direction:
        """Return the same direction with vectors of length 1."""
        return replace(self, vector=normalize(self.vector, dim=-1))

    def at(self, *patterns: str | Address, model: Model) -> Direction:
        """Return the vector of its one address at all addresses that some patterns mean in a model.

        Raises:
            Refused: it has several vectors, or the model has no such address, or another width there.
        """
        if len(self.vector) != 1:
            raise Refused(self._what, f"it has {len(self.vector)} vectors, and one is meant", _SELECTED)
        places = [str(a) for a in model.places(patterns)]
        spread = replace(
            self, vector=self.vector.expand(len(places), -1), midpoint=None, labels={**self.labels, "address": places}
        )
        spread.check(model)
        return spread

    def check(self, model: Model) -> None:
        """Check that a model has the addresses, with activations as wide as the vectors.

        Raises:
            Refused: an address that the model does not have, or another width.
        """
        check_widths(self._what, model, dict.fromkeys(map(str, self.places), self.vector.shape[1]))

    def component(self, x: Float[Tensor, "address *row width"]) -> Float[Tensor, "address *row"]:
        """Return the component of vectors along the unit vector at each address, (x·v) / ‖v‖, in activations' units."""
        return torch.einsum("a...w,aw->a...", x, self.unit().vector.to(x.device, x.dtype))

    @property
    def reads(self) -> tuple[str, ...]:
        """The last address, where `along` reads."""
        return (str(self.places[-1]),)

    def along(self, acts: Mapping[str, Float[Tensor, "text position width"]]) -> Float[Tensor, "text position"]:
        """Return the component of activations at the last address, in lengths of its vector."""
        (place,) = self.reads
        last = self.select(address=place)
        return last.component(acts[place].float()[None])[0] / last.norm[0].to(acts[place].device)

    def amounts(self) -> dict[str, float]:
        """Return the length of the vector at each address."""
        return {str(a): round(float(n), 4) for a, n in zip(self.places, self.norm, strict=True)}

    def random(self, samples: int, seed: int = 0) -> list[Direction]:
        """Return random directions with vectors of the same lengths at the same addresses."""
        drawn = torch.randn(samples, *self.vector.shape, generator=generator(seed))
        own = {"labels": {"address": self.labels["address"]}, "reasons": self.reasons, "family": self.family}
        return [Direction(vector=v, name="random", **own) for v in normalize(drawn, dim=-1) * self.norm[:, None]]

    # --- edits

    def add(self, strength: float = 1.0, positions: Sequence[int] | None = None) -> list[Add]:
        """Add `strength` times the vector at each address; negative strengths steer towards `negative`."""
        return [Add(a, v, strength, _tuple(positions)) for a, v in self._each()]

    def project_out(self, positions: Sequence[int] | None = None) -> list[Project]:
        """Remove the component along the vector at each address."""
        return [Project(a, v[None], positions=_tuple(positions)) for a, v in self._each()]

    def cap(
        self, *, min: float | None = None, max: float | None = None, positions: Sequence[int] | None = None
    ) -> list[Cap]:
        """Keep the component along the unit vector at each address within limits; equal ones clamp it to a value.

        Raises:
            Refused: no limit, or a least that is above the most.
        """
        return [Cap(a, v, min, max, _tuple(positions)) for a, v in self._each()]

    def condition(
        self, *, min: float | None = None, max: float | None = None, positions: Sequence[int] | None = None
    ) -> Condition:
        """Return the condition that a prompt's component along the unit vector at its one address is within limits.

        Without positions a prompt is read as `mean` has it, over its tokens but the first; (-1,) reads the last.

        Raises:
            Refused: several vectors, no limit, or a least that is above the most.
        """
        if len(self.vector) != 1:
            raise Refused(self._what, f"it has {len(self.vector)} vectors, and one is meant", _SELECTED)
        return Condition(self.places[0], self.vector[0], min, max, _tuple(positions))

    def _each(self) -> list[tuple[Address, Tensor]]:
        return list(zip(self.places, self.vector, strict=True))


#: the size of a model that is the width of a site's vectors, by the last axis of the site
_WIDTHS = {"d_model": "d_model", "d_head": "d_head", "neuron": "d_mlp", "channel": "d_inner"}


def check_widths(what: str, model: Model, widths: Mapping[str, int]) -> None:
    """Check that a model has some addresses, with values of these widths.

    Raises:
        Refused: an address that the model does not have, or another width.
    """
    for a, wanted in zip(model.places(list(widths)), widths.values(), strict=True):
        if (width := getattr(model.shape, _WIDTHS[a.row.axes.split()[-1]])) != wanted:
            why = f"it is {wanted} wide, and {a} of {model.name} is {width} wide"
            raise Refused(what, why, "give a direction that was found in this model")


def direction(
    vectors: Mapping[str, Float[Tensor, "width"]],
    name: str = "",
    positive: str = "",
    negative: str = "",
    family: str = "",
) -> Direction:
    """Return a direction from its vectors by address.

    Raises:
        Refused: no vector, vectors of several widths, an unknown site, or a vector that is zero or undefined.
    """
    what, widths = f"direction {name!r}", {tuple(v.shape) for v in vectors.values()}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        why = f"its vectors have the shapes {', '.join(map(str, map(list, widths)))}" if widths else "it has no vector"
        raise Refused(what, why, "give a vector per address, all of one width")
    stacked = torch.stack([v.detach().float().cpu() for v in vectors.values()])
    return Direction(
        vector=stacked,
        name=name,
        positive=positive,
        negative=negative,
        family=family,
        labels={"address": [str(parse(a)) for a in vectors]},
        reasons=dict.fromkeys(("vector", "midpoint"), "a direction is no measurement"),
    )


def tensors_of(found: Direction) -> dict[str, Any]:
    """Return the tensors that tell one direction from another."""
    return {"vector": found.vector}


def _tuple(positions: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if positions is None else tuple(positions)
