"""What every linear estimate starts from: slopes of the metric at named places, and the step that a patch would make.

Estimate of a place = Σ slope · (donor − own) over its tensor, where `slope` is a gradient, or what stands in for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.sites import site as site_row
from cutaway.core.stats import BOUNDS, bootstrap_mean, generator
from cutaway.models.backward import Attention, Cut, gradients
from cutaway.models.capture import Activations
from cutaway.models.edits import Replace
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.patching.activation import HeadEffects, PositionEffects
from cutaway.patching.audit import STATISTICS, Audit, audit
from cutaway.patching.exchange import Direction, Exchange, difference, run
from cutaway.patching.places import position_names, positions
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class NodeEffects(Result, kind="node_effects"):
    """Estimated effects of places of several sites beside each other; `exact` is NaN where nothing was audited."""

    effect: Float[Tensor, "node"]
    interval: Float[Tensor, "node bound"]
    null: Float[Tensor, "node sample"]
    recovered: Float[Tensor, "node"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    exact: Float[Tensor, "node"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None


@dataclass(frozen=True)
class Nodes:
    """The places of one site: [layer, head] of a head site, [layer, position] of a stream site."""

    site: str
    layers: tuple[int, ...]
    names: tuple[str, ...]
    tokens: Tokens
    head_axis: int | None

    @property
    def shape(self) -> tuple[int, int]:
        """Layers × heads or positions."""
        return len(self.layers), len(self.names)

    @property
    def second(self) -> str:
        """Name of the second axis."""
        return "position" if self.head_axis is None else "head"

    def addresses(self) -> list[Address]:
        """Every place, in the order of the estimate."""
        if self.head_axis is not None:
            return [Address(self.site, i, h) for i in self.layers for h in range(len(self.names))]
        return [Address(self.site, i, None, p) for i in self.layers for p in positions(self.tokens)]

    def sums(self, products: Sequence[Tensor]) -> Float[Tensor, "layer second prompt"]:
        """One product of the whole site a layer, summed over what each place holds."""
        return torch.stack([self._sum(p.float()) for p in products]).movedim(1, -1)

    def _sum(self, product: Tensor) -> Float[Tensor, "prompt second"]:
        if self.head_axis is not None:
            return product.sum([d for d in range(1, product.ndim) if d != self.head_axis])
        columns = torch.stack([self.tokens.column(p) for p in positions(self.tokens)], dim=1)
        return product.sum(-1).gather(1, columns.to(product.device))


def nodes(model: Model, tokens: Tokens, site: str) -> Nodes:
    """The places of a site.

    Raises:
        Refused: it is neither a head site nor a stream site, or this model does not have it.
    """
    row = site_row(site)
    axes = row.axes.split()
    if row.scope != "layer" or (row.head_axis is None and row.axes != "batch position d_model"):
        why = f"its axes are {row.axes}" if row.scope == "layer" else "it has no layers"
        raise Refused(f"attribution to site {site!r}", why, "use a stream site such as resid_pre, or a head site as z")
    layers = tuple(a.layer for a in model.places(site) if a.layer is not None)
    if row.head_axis is None:
        return Nodes(site, layers, tuple(position_names(tokens)), tokens, None)
    prefix, heads = ("kv " if row.head_axis == "kv_head" else ""), model.sizes()[row.head_axis]
    return Nodes(site, layers, tuple(f"{prefix}{h}" for h in range(heads)), tokens, axes.index(row.head_axis))


def slopes(
    model: Model,
    task: Task,
    sites: Sequence[str],
    direction: Direction,
    *,
    beside: Sequence[str] = (),
    cuts: Sequence[Cut] = ((),),
    relevance: Attention | None = None,
) -> tuple[Exchange, list[Nodes], list[Activations]]:
    """Two forwards (donor and target) and one backward a cut, for all sites at once.

    `beside` are further sites at which slopes and own activations, but no donor values, are needed.

    Raises:
        Refused: no such site, a corruption that does not change the metric, or no slope somewhere.
    """
    bound = task.bind(model)
    parts = [nodes(model, bound.clean, s) for s in sites]
    denoise = direction == "denoise"
    target, giver = (bound.corrupt, bound.clean) if denoise else (bound.clean, bound.corrupt)
    given, donor = run(model, giver, sites, bound)
    with model.edited():
        places = model.places([*sites, *beside])
        value, found, own = gradients(model.body, target, places, bound.metric, cuts, relevance)
    value = value.float()
    clean, corrupt = (given, value) if denoise else (value, given)
    gap = difference(task, clean, corrupt)
    return Exchange(bound, target, own, donor, clean, corrupt, value, gap, task.corruption), parts, found


def estimate(
    n: Nodes, own: Activations, donor: Activations, slope: Activations
) -> Float[Tensor, "layer second prompt"]:
    """First-order effect of every place, prompt by prompt."""
    places = [str(Address(n.site, i)) for i in n.layers]
    return n.sums([slope[p].float() * (donor[p].float() - own[p].float()) for p in places]).cpu()


def random_donor(own: Activations, donor: Activations, place: str, chance: torch.Generator) -> Tensor:
    """A value as far from one's own as the donor's, in a random direction."""
    old, step = own[place], donor[place].float() - own[place].float()
    noise = torch.randn(step.shape, generator=chance).to(step.device)
    return old + (noise * step.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)).to(old.dtype)


def random_estimate(
    n: Nodes, own: Activations, donor: Activations, slope: Activations, samples: int, seed: int
) -> Float[Tensor, "layer second sample"]:
    """Estimates for random steps of the donor's lengths, mean over prompts: what chance alone attributes."""
    chance, out = generator(seed), []
    for _ in range(samples):
        drawn = {p: random_donor(own, donor, p, chance) for p in (str(Address(n.site, i)) for i in n.layers)}
        steps = [slope[p].float() * (new.float() - own[p].float()) for p, new in drawn.items()]
        out.append(n.sums(steps).mean(-1).cpu())
    return torch.stack(out, dim=-1)


def audited(
    model: Model,
    x: Exchange,
    places: Sequence[Address],
    mean: Float[Tensor, "node"],
    n: int,
    size: Float[Tensor, "node"] | None = None,
) -> Audit | None:
    """The exact effects of patching `n` of the places, beside their estimates; None if none is asked for."""
    return audit(model, x, [[Replace(a, x.donor[str(a)])] for a in places], mean, n, size) if n else None


def notes(x: Exchange, done: Audit | None, places: int) -> dict[str, Any]:
    """What the record of an estimate says beyond its options."""
    checked = (
        f"{len(done.chosen)} of {places} places, evenly over the ranks of |estimate|" if done else "none asked for"
    )
    return x.notes() | {"effect is": "an estimate", "audited": checked}


def effects(
    model: Model, x: Exchange, parts: Sequence[Nodes], slope: Activations, *, audits: int, samples: int, seed: int
) -> HeadEffects | PositionEffects | NodeEffects:
    """The estimates of all places as a result, audited."""
    each = torch.cat([estimate(n, x.own, x.donor, slope).flatten(0, 1) for n in parts])
    null = torch.cat(
        [random_estimate(n, x.own, x.donor, slope, samples, seed + i).flatten(0, 1) for i, n in enumerate(parts)]
    )
    places = [a for n in parts for a in n.addresses()]
    mean, unit = each.mean(-1), x.bound.unit
    done = audited(model, x, places, mean, audits)
    one = parts[0] if len(parts) == 1 else None
    shape = one.shape if one else (len(places),)
    tensors = {
        "effect": mean, "interval": bootstrap_mean(each.T, seed=seed), "null": null, "recovered": mean / x.gap,
    }  # fmt: skip
    tensors |= {"exact": done.exact} if done else {}
    whole = {} if done is None else {"agreement": done.agreement, "agreement_interval": done.interval}
    labels: dict[str, list[Any]] = {"bound": BOUNDS} | ({"statistic": STATISTICS} if done else {})
    labels |= {"layer": list(one.layers), one.second: list(one.names)} if one else {"node": _named(parts)}
    kind = NodeEffects if one is None else PositionEffects if one.head_axis is None else HeadEffects
    return kind(
        **{name: t.reshape(*shape, *t.shape[1:]) for name, t in tensors.items()},
        **whole,
        clean=x.clean.cpu(),
        corrupt=x.corrupt.cpu(),
        labels=labels,
        units=dict.fromkeys(["effect", "interval", "null", *(["exact"] if done else [])], unit)
        | {"recovered": "share of clean − corrupt"},
        record=notes(x, done, len(places)),
    )


def _named(parts: Sequence[Nodes]) -> list[str]:
    names = []
    for n in parts:
        names += [f"{n.site}.{i}.{h}" if n.head_axis else f"{n.site}.{i} {h}" for i in n.layers for h in n.names]
    return names


def several(text: str) -> list[str]:
    """Site names separated by commas, each once."""
    return list(dict.fromkeys(s.strip() for s in text.split(",")))
