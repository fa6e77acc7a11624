"""The law by which true features fire: a forest of features, a low-rank copula, magnitudes.

Given the copula's factors of a token, features are independent, so only what can fire is looked at: features at the top
of the forest that are frequent (densely), rare ones (as a thinned point process), and then only the children of those
that fired. The distribution is exactly that of the dense definition (Chanin & Garriga-Alonso 2026, arXiv:2602.14687):

    z_i = factor_i · ε + √(1 − ‖factor_i‖²) η_i,   i fires if z_i > Φ⁻¹(1 − probability_i) and its parent is active;
    of exclusive siblings that fire, one is kept at random; magnitude = ReLU(mean_i + spread_i · N(0, 1)), times
    (parent's magnitude / parent's mean) if scaled; a feature of magnitude 0 is not active.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused

ROWS = 256  # tokens a time, so that the factors' products stay in the cache
FREQUENT = 0.02  # features at the top that fire more often than this are drawn densely
REACH = 2.2  # standard deviations of own noise beyond which a rare feature is a candidate


@dataclass(frozen=True)
class Law:
    """Joint distribution of features, as data.

    Attributes:
        probability: probability of firing, before the forest of parents is applied.
        parent: parent of each feature, without which it does not fire; −1 at the top.
        mean: mean magnitude.
        spread: standard deviation of magnitudes.
        factor: gives the Gaussian correlation of features i ≠ j as factor_i · factor_j; None if independent.
        uniform: True if magnitudes are uniform between 0 and 2·mean instead.
    """

    probability: Float[Tensor, "feature"]
    parent: Int[Tensor, "feature"]
    mean: Float[Tensor, "feature"]
    spread: Float[Tensor, "feature"]
    factor: Float[Tensor, "feature rank"] | None = None
    exclusive: bool = False
    scaled: bool = False
    uniform: bool = False

    def __post_init__(self):
        p = self.probability
        if not bool(((p >= 0) & (p <= 1)).all()):
            raise Refused(
                "firing probabilities", f"they reach from {p.min():g} to {p.max():g}", "give numbers in [0, 1]"
            )
        if bool((self.parent >= torch.arange(len(p))).any()):
            raise Refused("the forest of features", "a child comes before its parent", "number parents first")
        if self.factor is not None and bool(((self.factor**2).sum(-1) >= 1).any()):
            raise Refused("the copula", "a feature's factor has norm 1 or more", "shrink the factors")

    def __len__(self) -> int:
        return len(self.probability)

    @cached_property
    def threshold(self) -> Float[Tensor, "feature"]:
        """The value that a feature's standard normal variable must exceed for it to fire."""
        return torch.special.ndtri(1 - self.probability.double()).float()

    @cached_property
    def noise(self) -> Float[Tensor, "feature"]:
        """Standard deviation of what the copula's factors leave to the feature alone."""
        return torch.ones(len(self)) if self.factor is None else (1 - (self.factor**2).sum(-1)).sqrt()

    @cached_property
    def children(self) -> Int[Tensor, "feature sibling"]:
        """Children of every feature, filled up with −1."""
        own = self.parent.clamp(min=0)
        count = torch.bincount(own[self.parent >= 0], minlength=len(self))
        table = torch.full((len(self), int(count.max())), -1)
        child = (self.parent >= 0).nonzero().squeeze(1)
        child = child[self.parent[child].argsort(stable=True)]
        start = count.cumsum(0) - count
        table[self.parent[child], torch.arange(len(child)) - start[self.parent[child]]] = child
        return table

    @cached_property
    def depth(self) -> Int[Tensor, "feature"]:
        """Number of ancestors of each feature."""
        depth = torch.zeros(len(self), dtype=torch.long)
        for _ in range(len(self)):
            deeper = torch.where(self.parent >= 0, depth[self.parent.clamp(min=0)] + 1, 0)
            if torch.equal(deeper, depth):
                break
            depth = deeper
        return depth

    @cached_property
    def _top(self) -> tuple[Tensor, Tensor]:
        top = self.parent < 0
        often = top & (self.probability > FREQUENT)
        return often.nonzero().squeeze(1), (top & ~often & (self.probability > 0)).nonzero().squeeze(1)

    def draw(self, tokens: int, g: torch.Generator) -> Active:
        """Return the active features of `tokens` tokens and their magnitudes."""
        parts = [self._some(min(ROWS, tokens - first), g).moved(first) for first in range(0, tokens, ROWS)]
        return Active.join(parts)

    def _some(self, tokens: int, g: torch.Generator) -> Active:
        eps = None if self.factor is None else torch.randn(tokens, self.factor.shape[1], generator=g)
        often, rare = self._top
        found = [self._frequent(tokens, often, eps, g), *([self._rare(tokens, rare, eps, g)] if len(rare) else [])]
        level = self._alive(torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]), g)
        levels = [level]
        while self.children.shape[1] and len(level.row):
            level = self._descend(level, eps, g)
            levels.append(level)
        return Active.join(levels)

    def _frequent(
        self, tokens: int, which: Tensor, eps: Tensor | None, g: torch.Generator
    ) -> tuple[Int[Tensor, "entry"], Int[Tensor, "entry"]]:
        z = torch.randn(tokens, len(which), generator=g).mul_(self.noise[which])
        if eps is not None and self.factor is not None:
            z.addmm_(eps, self.factor[which].T)
        row, column = (z > self.threshold[which]).nonzero(as_tuple=True)
        return row, which[column]

    def _rare(
        self, tokens: int, which: Tensor, eps: Tensor | None, g: torch.Generator
    ) -> tuple[Int[Tensor, "entry"], Int[Tensor, "entry"]]:
        """Rare features fire through strong own noise (thinned points) or where the factors carry them (listed)."""
        bar, noise = self.threshold[which], self.noise[which]
        reach = REACH if eps is not None else float(bar.min())
        beyond = float(torch.special.ndtr(torch.tensor(-reach, dtype=torch.double)))
        points = _points(tokens * len(which), beyond, g)
        column = points % len(which)
        if eps is None or self.factor is None:
            chance = torch.special.ndtr(-bar[column]) / beyond
            cell = points[torch.rand(len(points), generator=g) < chance]
            return cell // len(which), which[cell % len(which)]
        # positive where noise below `reach` is enough: those cells are decided apart, by their whole probability
        near = torch.addmm(noise * reach - bar, eps, self.factor[which].T)
        at = near.view(-1).index_select(0, points)
        chance = torch.special.ndtr(at / noise[column] - reach) / beyond
        far = points[(at <= 0) & (torch.rand(len(points), generator=g) < chance)]
        close = (near > 0).view(-1).nonzero().squeeze(1)
        chance = torch.special.ndtr(near.view(-1).index_select(0, close) / noise[close % len(which)] - reach)
        cell = torch.cat([far, close[torch.rand(len(close), generator=g) < chance]])
        return cell // len(which), which[cell % len(which)]

    def _alive(self, row: Tensor, feature: Tensor, g: torch.Generator) -> Active:
        value = self._magnitude(feature, g)
        keep = value > 0
        return Active(row[keep], feature[keep], value[keep])

    def _magnitude(self, feature: Tensor, g: torch.Generator) -> Tensor:
        if self.uniform:
            return torch.rand(feature.shape, generator=g) * 2 * self.mean[feature]
        normal = torch.randn(feature.shape, generator=g)
        return torch.addcmul(self.mean[feature], self.spread[feature], normal).relu_()

    def _descend(self, above: Active, eps: Tensor | None, g: torch.Generator) -> Active:
        child = self.children[above.feature]
        has = child[:, 0] >= 0
        above, child = above.where(has), child[has]
        kin = child.clamp(min=0)
        z = torch.randn(child.shape, generator=g).mul_(self.noise[kin])
        if eps is not None and self.factor is not None:
            near = self.factor.index_select(0, kin.view(-1)).view(*kin.shape, self.factor.shape[1])
            z += (near @ eps.index_select(0, above.row).unsqueeze(-1)).squeeze(-1)
        value = self._magnitude(kin, g)
        if self.scaled:
            value *= (above.value / self.mean[above.feature])[:, None]
        alive = (z > self.threshold[kin]) & (child >= 0) & (value > 0)
        if self.exclusive:
            lot = torch.rand(alive.shape, generator=g) + alive.float()  # every living sibling equally often
            alive &= torch.zeros_like(alive).scatter_(1, lot.argmax(1, keepdim=True), True)
        entry, sibling = alive.nonzero(as_tuple=True)
        return Active(above.row[entry], child[entry, sibling], value[entry, sibling])


@dataclass(frozen=True)
class Active:
    """Active features as entries: the token's row, the feature, its magnitude."""

    row: Int[Tensor, "entry"]
    feature: Int[Tensor, "entry"]
    value: Float[Tensor, "entry"] = field(repr=False)

    def moved(self, rows: int) -> Active:
        """Return the same entries `rows` rows further down."""
        return Active(self.row + rows, self.feature, self.value)

    def where(self, keep: Bool[Tensor, "entry"]) -> Active:
        """Only the entries to keep."""
        return Active(self.row[keep], self.feature[keep], self.value[keep])

    @classmethod
    def join(cls, parts: list[Active]) -> Active:
        """Return all entries one after another."""
        return cls(*(torch.cat([getattr(p, n) for p in parts]) for n in ("row", "feature", "value")))


def _points(cells: int, probability: float, g: torch.Generator) -> Int[Tensor, "point"]:
    """Return the cells chosen independently with one probability, found by jumping over the gaps between them."""
    expected = cells * probability
    room, last, found = int(expected + 6 * math.sqrt(expected) + 16), -1, []
    while last < cells:
        jumps = torch.empty(room, dtype=torch.double).exponential_(-math.log1p(-probability), generator=g)
        found.append(jumps.long().add_(1).cumsum(0) + last)  # the whole part of an exponential is geometric
        last = int(found[-1][-1])
    points = torch.cat(found)
    return points[points < cells]
