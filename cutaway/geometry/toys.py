"""Toys of encodings: small sets of activations that are made from features in a known way.

Each toy draws values of features [example, feature] and writes them into activations [example, d]; its row in `TOYS`
says what `geometry.properties` must find. Noise of a hundredth is added, as no real activation is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.stats import rotation

NOISE = 0.01
Drawn = tuple[Tensor, Tensor]  # values [example, feature] and activations [example, d]


@dataclass(frozen=True)
class Toy:
    """A way of encoding features, with the truth about it.

    Attributes:
        draw: returns values and activations for a number of examples.
        says: the encoding in words.
        decomposable: True if each feature writes the same whatever the others are.
        linear: True if each feature writes along a direction, as much as its value; None where a level before fails.
        superposed: True if the directions of the represented features depend on each other linearly.
        basis_aligned: True if each represented feature has a dimension of its own.
        partly_aligned: True if the directions are sparser than in a random basis.
    """

    draw: Callable[[int, torch.Generator], Drawn]
    says: str
    decomposable: bool
    linear: bool | None = None
    superposed: bool | None = None
    basis_aligned: bool | None = None
    partly_aligned: bool | None = None


def sparse(examples: int, features: int, chance: float, g: torch.Generator) -> Float[Tensor, "example feature"]:
    """Draw features that are 0 but for a share of the examples, and uniform between 0 and 1 there."""
    on = torch.rand(examples, features, generator=g) < chance
    return torch.rand(examples, features, generator=g) * on


def _written(values: Tensor, rows: Tensor, g: torch.Generator) -> Drawn:
    x = values @ rows
    return values, x + NOISE * torch.randn(x.shape, generator=g)


def _identity(n: int, g: torch.Generator) -> Drawn:
    return _written(sparse(n, 5, 0.5, g), torch.eye(5), g)


def _rotated(n: int, g: torch.Generator) -> Drawn:
    return _written(sparse(n, 5, 0.5, g), rotation(5, g, dtype=torch.double).float(), g)


def pentagon(g: torch.Generator) -> Float[Tensor, "feature d"]:
    """Return five directions at equal angles in a plane, turned at random: what sparse features are given."""
    angles = torch.arange(5) * (2 * math.pi / 5) + 2 * math.pi * torch.rand(1, generator=g)
    return torch.stack([angles.cos(), angles.sin()], 1)


def _pentagon(n: int, g: torch.Generator) -> Drawn:
    return _written(sparse(n, 5, 0.2, g), pentagon(g), g)


def _two_kept(n: int, g: torch.Generator) -> Drawn:
    rows = torch.cat([rotation(2, g, dtype=torch.double).float(), torch.zeros(3, 2)])
    return _written(sparse(n, 5, 1.0, g), rows, g)


def _shared_neuron(n: int, g: torch.Generator) -> Drawn:
    rows = torch.eye(3)[[0, 0, 1, 2]]
    return _written(sparse(n, 4, 0.5, g), rows, g)


def _absolute(n: int, g: torch.Generator) -> Drawn:
    """Write each feature on two of eight neurons that are no further than one or four apart; no neuron is below 0."""
    pairs = [(i, (i + 1) % 8) for i in range(8)] + [(i, i + 4) for i in range(4)]
    rows = torch.zeros(12, 8)
    for row, pair in zip(rows, pairs, strict=True):
        row[list(pair)] = 0.5**0.5
    values, x = _written(sparse(n, 12, 0.1, g), rows, g)
    return values, x.relu()


def _product(n: int, g: torch.Generator) -> Drawn:
    values = sparse(n, 2, 0.7, g)
    row = torch.nn.functional.normalize(torch.randn(1, 4, generator=g))
    return values, _written(values.prod(1, keepdim=True), row, g)[1]


def _onion(n: int, g: torch.Generator) -> Drawn:
    """Write when a token occurred (0: never) as the size of its vector, which shrinks by half at each step."""
    steps = torch.randint(0, 6, (n, 4), generator=g).float()
    return steps, _written((steps > 0) * 0.5 ** (steps - 1), rotation(4, g, dtype=torch.double).float(), g)[1]


def _angle(n: int, g: torch.Generator) -> Drawn:
    angles = 2 * math.pi * torch.rand(n, 2, generator=g)
    planes = torch.cat([angles.cos(), angles.sin()], 1)
    return angles, _written(planes, rotation(4, g, dtype=torch.double).float(), g)[1]


TOYS: dict[str, Toy] = {
    "identity": Toy(_identity, "five features, each in a dimension of its own", True, True, False, True, True),
    "rotated": Toy(_rotated, "the same, turned by a random rotation", True, True, False, False, False),
    "pentagon": Toy(_pentagon, "five sparse features in two dimensions", True, True, True, False, False),
    "two_kept": Toy(_two_kept, "five dense features, of which two are kept", True, True, False, False, False),
    "shared_neuron": Toy(_shared_neuron, "four features, two of them in one dimension", False),
    "absolute": Toy(_absolute, "twelve sparse features, each on two of eight neurons", True, True, True, False, True),
    "product": Toy(_product, "the product of two features along a direction", False),
    "onion": Toy(_onion, "steps of time as sizes of vectors that shrink by half", True, False),
    "angle": Toy(_angle, "two angles as points on circles", True, False),
}
