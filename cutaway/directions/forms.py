"""Forms of intervention on a direction: edits, or rewrites of weights, that bring a behaviour about or stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.directions.behaviour import streams_at
from cutaway.directions.direction import Direction
from cutaway.directions.orthogonalise import orthogonalised
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Add, Cap, Project
from cutaway.models.edits.rewrites import Rewrite
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

_STREAMS = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True)
class Basis:
    """A direction with what forms of intervention need beside it.

    Attributes:
        model: the model.
        direction: the direction, at its first address.
        position: the position from the end at which vectors are read.
        places: the direction's address, and the inputs of all blocks behind it.
        each: the difference of means at the input of every block.
        means: mean vectors at `places`, of texts without the concept and of both classes alike.
        strength: the factor of additions.
    """

    model: Model
    direction: Direction
    position: int
    places: tuple[Address, ...]
    each: Float[Tensor, "layer d_model"]
    means: Float[Tensor, "level place d_model"]
    strength: float

    @staticmethod
    def of(
        model: Model, direction: Direction, tokens: Tokens, y: Bool[Tensor, "text"], position: int, strength: float
    ) -> Basis:
        """Read the means of both classes of some texts.

        Raises:
            Refused: the direction's first address is not the residual stream.
        """
        places = _places(model, direction)
        direction = direction.select(address=[str(places[0])])
        inputs = streams_at(model, tokens, ["resid_pre"], [position])[0]
        x = streams_at(model, tokens, places, [position])[0]
        one, other = x[:, y].mean(1), x[:, ~y].mean(1)
        each = inputs[:, y].mean(1) - inputs[:, ~y].mean(1)
        return Basis(model, direction, position, places, each, torch.stack([other, (one + other) / 2]), strength)

    @property
    def vector(self) -> Float[Tensor, "d_model"]:
        """The direction's vector."""
        return self.direction.vector[0]

    def drawn(self, samples: int, seed: int) -> list[Basis]:
        """Return bases with random directions of the same lengths in the place of all of it."""
        g, out = generator(seed), list[Basis]()
        for _ in range(samples):
            v, each = (
                normalize(torch.randn(x.shape, generator=g), dim=-1) * x.norm(dim=-1, keepdim=True)
                for x in (self.direction.vector, self.each)
            )
            out.append(replace(self, direction=replace(self.direction, vector=v), each=each))
        return out

    def clamped(self, level: int) -> list[Edit]:
        """Return edits that set the component along the direction to its mean of a level, at all places."""
        found = (self.means[level] @ normalize(self.vector, dim=0)).tolist()
        return [Cap(a, self.vector, c, c) for a, c in zip(self.places, found, strict=True)]


def _places(model: Model, direction: Direction) -> tuple[Address, ...]:
    direction.check(model)
    place = direction.places[0]
    if place.site not in _STREAMS or place.position is not None:
        why = f"{place} is not the residual stream at all positions"
        raise Refused("an intervention", why, f"give a direction of {', '.join(_STREAMS)}")
    behind = range((place.layer or 0) + 1, model.shape.n_layers)
    return place, *(Address("resid_pre", layer=i) for i in behind)


@dataclass(frozen=True)
class Form:
    """A form of intervention.

    Attributes:
        edits: returns its edits.
        rewrites: returns its rewrites of the weights of a model whose embedding and unembedding are two weights.
    """

    edits: Callable[[Basis], list[Edit]] = lambda b: []
    rewrites: Callable[[Basis, Model], list[Rewrite]] | None = None


def _add(b: Basis) -> list[Edit]:
    return [Add(b.places[0], b.vector, b.strength)]


def _subtract(b: Basis) -> list[Edit]:
    return [Add(b.places[0], b.vector, -b.strength)]


def _zero(b: Basis) -> list[Edit]:
    return [Project(a, b.vector[None]) for a in b.model.places(["resid_pre", "attn_out", "mlp_out"])]


def _per_layer(b: Basis) -> list[Edit]:
    sites = ("resid_pre", "attn_out", "mlp_out")
    return [Project(Address(s, layer=i), v[None]) for i, v in enumerate(b.each) if v.any() for s in sites]


#: every form of intervention by its name
FORMS: dict[str, Form] = {
    "add": Form(_add),
    "subtract": Form(_subtract),
    "zero": Form(_zero),
    "per_layer": Form(_per_layer),
    "affine": Form(lambda b: b.clamped(0)),
    "mean": Form(lambda b: b.clamped(1)),
    "weights": Form(rewrites=lambda b, untied: orthogonalised(untied, b.direction)),
}
