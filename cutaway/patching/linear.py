"""What every linear estimate starts from: slopes of the metric at named places, and the step that a patch would make.

Estimate of a place = Σ slope · (donor − own) over its tensor, where `slope` is a gradient, or what stands in for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address, parse, unit_axis
from cutaway.core.refuse import Refused
from cutaway.core.sites import site as site_row
from cutaway.core.stats import BOUNDS, bootstrap_mean, generator
from cutaway.models.backward import Attention, Cut, gradients
from cutaway.models.capture import Activations
from cutaway.models.edits import Replace
from cutaway.models.model import Model
from cutaway.patching.audit import STATISTICS, Audit, audit
from cutaway.patching.cells import Cells, cells
from cutaway.patching.effects import BY_AXES
from cutaway.patching.exchange import Direction, Exchange, difference, run
from cutaway.patching.places import positions
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task


def slopes(
    model: Model,
    task: Task,
    sites: Sequence[str],
    direction: Direction,
    *,
    beside: Sequence[str] = (),
    cuts: Sequence[Cut] = ((),),
    relevance: Attention | None = None,
) -> tuple[Exchange, list[Cells], list[Activations]]:
    """Two forwards (donor and target) and one backward a cut, for all sites at once.

    `beside` are further sites at which slopes and own activations, but no donor values, are needed.

    Raises:
        Refused: no such site, a corruption that does not change the metric, or no slope somewhere.
    """
    bound = task.bind(model)
    parts = [_grid(model, bound, s) for s in sites]
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


def _grid(model: Model, bound: Bound, pattern: str) -> Cells:
    grid = cells(model, bound.clean, pattern)
    if grid is None:
        why = "a pattern that names units or positions is no whole site"
        raise Refused(f"attribution to {pattern!r}", why, "name the site, and read the entries of its result")
    return grid


def sums(n: Cells, products: Sequence[Tensor]) -> Float[Tensor, "layer second prompt"]:
    """One product of the whole site a layer, summed over what each cell holds."""
    return torch.stack([_sum(n, p.float()) for p in products]).movedim(1, -1)


def _sum(n: Cells, product: Tensor) -> Float[Tensor, "prompt second"]:
    if n.unit is not None:
        axes = site_row(n.site).axes.split()
        own = axes.index(str(unit_axis(site_row(n.site))))
        return product.sum([d for d in range(1, product.ndim) if d != own]) if product.ndim > 2 else product
    columns = torch.stack([n.tokens.column(p) for p in positions(n.tokens)], dim=1)
    return product.flatten(2).sum(-1).gather(1, columns.to(product.device))


def estimate(
    n: Cells, own: Activations, donor: Activations, slope: Activations
) -> Float[Tensor, "layer second prompt"]:
    """First-order effect of every place, prompt by prompt."""
    places = [str(Address(n.site, i)) for i in n.layers]
    return sums(n, [slope[p].float() * (donor[p].float() - own[p].float()) for p in places]).cpu()


def random_donor(own: Activations, donor: Activations, place: str, chance: torch.Generator) -> Tensor:
    """A value as far from one's own as the donor's, in a random direction."""
    old, step = own[place], donor[place].float() - own[place].float()
    noise = torch.randn(step.shape, generator=chance).to(step.device)
    if unit_axis(parse(place).row) == "neuron":  # one dimension each: only the sign can be random
        return old + (noise.sign() * step.abs()).to(old.dtype)
    return old + (noise * step.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)).to(old.dtype)


def random_estimate(
    n: Cells, own: Activations, donor: Activations, slope: Activations, samples: int, seed: int
) -> Float[Tensor, "layer second sample"]:
    """Estimates for random steps of the donor's lengths, mean over prompts: what chance alone attributes."""
    chance, out = generator(seed), []
    for _ in range(samples):
        drawn = {p: random_donor(own, donor, p, chance) for p in (str(Address(n.site, i)) for i in n.layers)}
        steps = [slope[p].float() * (new.float() - own[p].float()) for p, new in drawn.items()]
        out.append(sums(n, steps).mean(-1).cpu())
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
    model: Model, x: Exchange, parts: Sequence[Cells], slope: Activations, *, audits: int, samples: int, seed: int
) -> Any:
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
    labels |= one.labels() if one else {"node": [name for n in parts for name in n.names()]}
    return BY_AXES[one.axes if one else ("node",)](
        **{name: t.reshape(*shape, *t.shape[1:]) for name, t in tensors.items()},
        **whole,
        clean=x.clean.cpu(),
        corrupt=x.corrupt.cpu(),
        labels=labels,
        units=dict.fromkeys(["effect", "interval", "null", *(["exact"] if done else [])], unit)
        | {"recovered": "share of clean − corrupt"},
        record=notes(x, done, len(places)),
    )
