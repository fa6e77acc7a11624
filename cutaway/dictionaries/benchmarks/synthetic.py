"""Synthetic benchmarks in the manner of SynthSAEBench (Chanin & Garriga-Alonso 2026, arXiv:2602.14687), as data.

`16k` is SynthSAEBench-16k, version 2: the published recipe and seeds. `4k` and `1k` are smaller, with the same shape of
hierarchy, frequencies and noise, for machines without an accelerator; `1k` is made in a moment.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused, nearest
from cutaway.core.stats import generator
from cutaway.dictionaries.benchmarks.directions import pushed_apart, random_directions
from cutaway.dictionaries.benchmarks.generative import Law
from cutaway.dictionaries.benchmarks.truth import Truth


@dataclass(frozen=True)
class SyntheticRecipe:
    """A synthetic benchmark as data; `make` builds it, always the same.

    The first features are the `roots` of trees of `depth` levels below them, each parent with `branching` exclusive
    children; what remains is free. Frequencies fall as rank^−exponent from `most` to `least`, magnitudes from `loud` to
    `quiet`.
    """

    features: int
    d: int
    roots: int
    branching: int = 4
    depth: int = 3
    exponent: float = 0.5
    most: float = 0.4
    least: float = 5e-4
    loud: float = 5.0
    quiet: float = 4.0
    spread: tuple[float, float] = (0.5, 0.5)
    rank: int = 25
    correlation: float = 0.1
    apart: tuple[int, float] = (100, 3e-4)
    bias: float = 0.5
    seed: int = 42

    def make(self) -> Truth:
        """Build the truth."""
        parent = forest(self.features, self.roots, self.branching, self.depth)
        base = zipf(self.features, self.exponent, self.most, self.least)
        g = generator(self.seed)
        directions = random_directions(self.features, self.d, g)
        bias = torch.randn(self.d, generator=g)
        low, wide = self.spread
        factor = torch.randn(self.features, self.rank, generator=generator(self.seed + 4)) * self.correlation
        length = factor.norm(dim=-1, keepdim=True)
        law = Law(
            compensated(base, parent),
            parent,
            torch.linspace(self.loud, self.quiet, self.features),
            (low + torch.randn(self.features, generator=generator(self.seed + 1)) * wide).abs(),
            factor * (0.99**0.5 / length).clamp(max=1),
            exclusive=True,
            scaled=True,
        )
        steps, lr = self.apart
        return Truth(
            pushed_apart(directions, steps=steps, lr=lr), bias / bias.norm() * self.bias, law, {"recipe": asdict(self)}
        )


RECIPES: dict[str, SyntheticRecipe] = {
    "1k": SyntheticRecipe(1024, 128, roots=8),
    "4k": SyntheticRecipe(4096, 256, roots=32),
    "16k": SyntheticRecipe(16384, 768, roots=128),
}
#: latents of the dictionaries that are compared on each, and the L0 at which they are compared
WIDTHS: dict[str, tuple[int, int]] = {"1k": (256, 5), "4k": (1024, 12), "16k": (4096, 25)}


def synthetic(name: str) -> Truth:
    """Return the synthetic benchmark of a name.

    Raises:
        Refused: there is none of that name.
    """
    if name not in RECIPES:
        near = nearest(name, RECIPES)
        raise Refused(
            f"truth {name!r}", f"there is none{f'; near: {near}' if near else ''}", f"use {', '.join(RECIPES)}"
        )
    return RECIPES[name].make()


def forest(features: int, roots: int, branching: int, depth: int) -> Int[Tensor, "feature"]:
    """Return the parents of features numbered level by level; −1 for roots and for what is left over."""
    parent = torch.full((features,), -1)
    above, first = 0, min(roots, features)
    for _ in range(depth):
        last = min(first + (first - above) * branching, features)
        parent[first:last] = above + torch.arange(last - first) // branching
        above, first = first, last
    return parent


def zipf(features: int, exponent: float, most: float, least: float) -> Float[Tensor, "feature"]:
    """Return the frequencies that fall as rank^−exponent, stretched to reach from `most` to `least`."""
    p = torch.arange(1, features + 1).float() ** -exponent
    return least + (most - least) * (p - p[-1]) / (p[0] - p[-1])


def compensated(base: Float[Tensor, "feature"], parent: Int[Tensor, "feature"]) -> Float[Tensor, "feature"]:
    """Return the probabilities before the forest that bring the frequencies after it near `base`.

    A child needs its parent, so it gets 1 / base[parent]; and it competes with siblings, so it gets
    (1 + Σ base[siblings] / base[parent]); at most 1, which is why frequent families fire less than `base` says.
    """
    has, above = parent >= 0, parent.clamp(min=0)
    family = torch.zeros_like(base).index_add_(0, above[has], base[has])
    rivals = torch.where(has, (family[above] - base).clamp(min=0) / base[above], 0)
    return torch.where(has, base / base[above] * (1 + rivals), base).clamp(max=1)
