"""Edges of a feature circuit: the part of a node's effect that goes directly through another node.

The edge u → d = ∂m/∂d · ∂d/∂u · (step of u), with nothing flowing through other submodules between the two (Marks et
al. 2024, arXiv:2403.19647). One forward is cut at every submodule; each downstream node is one backward to those before
it. As a submodule's output is the sum of its nodes, the edges out of a node to all nodes, and to the metric, add up to
its gradient effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.stats import mean_interval
from cutaway.graphs.node_effects import NodeEffects
from cutaway.graphs.submodules import Change, Submodule
from cutaway.models.access.backward import SeveredForward, sever
from cutaway.models.dry import some
from cutaway.models.model import Model


@dataclass(frozen=True, eq=False)
class Edges:
    """Edges above a threshold; the metric is the node behind all others.

    Attributes:
        source: numbers of the nodes that they leave, among those kept.
        target: numbers of the nodes that they enter.
        weight: means over prompts.
        interval: their intervals.
        null: means for steps of the source as long along random latents.
    """

    source: Int[Tensor, "edge"]
    target: Int[Tensor, "edge"]
    weight: Float[Tensor, "edge"]
    interval: Float[Tensor, "edge bound"]
    null: Float[Tensor, "edge sample"]


@dataclass(frozen=True, eq=False)
class _Upstream:
    """The kept nodes of a submodule: their change, and where in its tables and among all kept nodes they stand."""

    change: Change
    cells: Int[Tensor, "kept"]
    numbers: Int[Tensor, "kept"]

    def products(self, slope: Tensor) -> Float[Tensor, "prompt kept"]:
        return self.change.effects(slope).flatten(1)[:, self.cells]

    def chance(self, slope: Tensor) -> Float[Tensor, "kept sample"]:
        return self.change.chance(slope).flatten(0, 1)[self.cells]


def node_edges(model: Model, found: NodeEffects, chosen: Int[Tensor, "kept"], least: float) -> Edges:
    """Return the edges between chosen nodes, and from them to the metric, whose mean is at least that large."""
    x, subs = found.runs, [c.sub for c in found.changes]
    sites, beside = [s.site for s in subs], [s.read for s in subs]
    with model.edited():
        run = sever(model.anatomy, x.target, sites, x.bound.measure, beside)
    ups = _upstream(found, chosen)
    parts = [_above(ups, number, slopes, least) for number, slopes in _downstream(run, found, chosen)]
    last = sites[-1]
    direct = run.direct() | {last: found.slopes[last]}  # behind it nothing is between a node and the metric
    parts.append(_above(ups, len(chosen), {b: direct[s.site] for b, s in enumerate(subs)}, least))
    return Edges(*(torch.cat(t) for t in zip(*parts, strict=True)))


def _upstream(found: NodeEffects, chosen: Int[Tensor, "kept"]) -> dict[int, _Upstream]:
    """Return the chosen nodes of each submodule that has any."""
    out = dict[int, _Upstream]()
    for b, (start, end) in enumerate(zip(found.starts, found.starts[1:], strict=False)):
        numbers = ((chosen >= start) & (chosen < end)).nonzero()[:, 0]
        if not len(numbers):
            continue
        c = found.changes[b]
        width = c.sub.n_latents + 1
        place, column = (chosen[numbers] - start) // width, (chosen[numbers] - start) % width
        latents = column[column < c.sub.n_latents].unique()
        index = torch.searchsorted(latents, column)  # the error's column is behind all
        cells = place * (len(latents) + 1) + index
        out[b] = _Upstream(c.of(latents.to(c.columns.device)), cells.to(c.columns.device), numbers)
    return out


def _downstream(
    run: SeveredForward, found: NodeEffects, chosen: Int[Tensor, "kept"]
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Yield each chosen node with the slopes of its value, times its own slope, at the submodules before it."""
    states = dict[int, _State]()
    for number, node in some([(i, n) for i, n in enumerate(chosen.tolist()) if n >= found.starts[1]]):
        c, place, column = found.at(node)
        b = c.sub.block
        if b not in states:
            states = {b: _State.of(c.sub, run, found.slopes[c.sub.site])}
        given = states[b].cotangents(c, place, column)
        slopes = run.products(given)
        yield number, {i: slopes[found.changes[i].sub.site] for i in range(b)}


@dataclass(frozen=True, eq=False)
class _State:
    """A submodule in the clean run: the slope at its site, that of each latent, and each latent's own derivative."""

    sub: Submodule
    run: SeveredForward
    slope: Float[Tensor, "batch position width"]
    latents: Float[Tensor, "batch position latent"]

    @classmethod
    def of(cls, sub: Submodule, run: SeveredForward, slope: Tensor) -> _State:
        g = slope.flatten(2).to(sub.decoder)
        return cls(sub, run, g, (g @ sub.decoder.T) * sub.slopes(run.arriving[sub.read].detach()))

    def cotangents(self, c: Change, place: int, column: int) -> dict[Address, Tensor]:
        """Return the gradient of (∂m/∂d) d at the sites that the node d is computed from."""
        sub = self.sub
        if column < sub.n_latents:
            at = c.places.only(self.latents[..., column, None], place)
            return {sub.read: self._shaped(sub.read, at * sub.encoder[column])}
        behind = -(c.places.only(self.latents, place) @ sub.encoder)
        direct = c.places.only(self.slope, place)
        if sub.read == sub.site:
            return {sub.read: self._shaped(sub.read, behind + direct)}
        return {sub.read: self._shaped(sub.read, behind), sub.site: self._shaped(sub.site, direct)}

    def _shaped(self, site: Address, x: Tensor) -> Tensor:
        return x.reshape(self.run.arriving[site].shape)


@torch.no_grad()
def _above(
    ups: dict[int, _Upstream], target: int, slopes: dict[int, Tensor], least: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the edges into one node that are large enough: source, target, weight, interval and null."""
    mine = [(up, slopes[b]) for b, up in ups.items() if b in slopes]
    if not mine:
        nothing = torch.empty(0, dtype=torch.long)
        samples = next(iter(ups.values())).change.partner.shape[0]
        return nothing, nothing, torch.empty(0), torch.empty(0, 2), torch.empty(0, samples)
    each = torch.cat([up.products(g) for up, g in mine], 1).float().cpu()
    null = torch.cat([up.chance(g) for up, g in mine]).float().cpu()
    numbers = torch.cat([up.numbers for up, _ in mine])
    large = each.mean(0).abs() >= least
    source = numbers[large]
    each = each[:, large]
    return source, torch.full_like(source, target), each.mean(0), mean_interval(each), null[large]
