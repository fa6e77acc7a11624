"""Which places carry the difference between the clean and the corrupt prompt?

Activation patching (Vig et al. 2020, arXiv:2004.12265; Meng et al. 2022, arXiv:2202.05262; Zhang & Nanda 2024,
arXiv:2309.16042). In `denoise`, the corrupt prompt runs with one activation taken from the clean run: what suffices to
bring the answer back. In `noise`, the clean prompt runs with one activation from the corrupt run: what is necessary.

* `effect` = metric(patched) − metric(unpatched), mean over prompts, in the metric's unit; positive means more answer.
  `recovered` = mean effect / mean(clean − corrupt): 1 is all of the difference, and `noise` makes it negative.
* A stream site (`resid_pre`, `attn_out`, `mlp_out` …) is patched at one layer and position: [layer, position]. A head
  site (`z`, `q`, `pattern` …) at one layer and head, at all positions at once: [layer, head].
* `interval`: bootstrap over prompts. Control (`null`): the same place receives, instead of the other run's value, a
  step of the same length in a random direction.
* Known failures: single patches miss redundant components, and denoising overstates a place that everything passes.
* Equivalences (tests): patching `resid_pre` of layer 0 at every changed position at once gives the other run; with
  `resid_post` at the last layer and position the recovery is 1.
* Cost: one forward a cell and sample, from the patched layer on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.sites import site as site_row
from cutaway.core.stats import BOUNDS, bootstrap_mean, generator
from cutaway.models.capture import Activations
from cutaway.models.edits import Edit, Replace
from cutaway.models.executor import sweep
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.patching.exchange import Direction, exchange, measured
from cutaway.patching.places import position_names, positions
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

_STREAM = "batch position d_model"


@dataclass(frozen=True, kw_only=True)
class PositionEffects(Result, kind="position_effects"):
    """Effect of patching one stream site at one layer and position.

    Where `effect` is an estimate, `exact` holds the audited places (NaN elsewhere), and `agreement` says how well the
    estimate agrees with them.
    """

    effect: Float[Tensor, "layer position"]
    interval: Float[Tensor, "layer position bound"]
    null: Float[Tensor, "layer position sample"]
    recovered: Float[Tensor, "layer position"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    exact: Float[Tensor, "layer position"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None


@dataclass(frozen=True, kw_only=True)
class HeadEffects(Result, kind="head_effects"):
    """Effect of patching one head site at one layer and head, at all positions at once.

    Where `effect` is an estimate, `exact` holds the audited places (NaN elsewhere), and `agreement` says how well the
    estimate agrees with them.
    """

    effect: Float[Tensor, "layer head"]
    interval: Float[Tensor, "layer head bound"]
    null: Float[Tensor, "layer head sample"]
    recovered: Float[Tensor, "layer head"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    exact: Float[Tensor, "layer head"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None


@method(
    answers="Which places carry the difference between the clean and the corrupt prompt?",
    paper="Zhang & Nanda 2024, arXiv:2309.16042; Meng et al. 2022, arXiv:2202.05262",
    cost="prompts * (5 + (1 + samples) * layer * (position + head)) * F",
    control="random_direction",
)
def activation(
    model: Model,
    task: Task,
    /,
    *,
    site: str = "resid_pre",
    direction: Direction = "denoise",
    samples: int = 4,
    seed: int = 0,
) -> PositionEffects | HeadEffects:
    """Exchange one activation at a time between the clean and the corrupt run.

    Args:
        site: a stream site (patched by layer and position) or a head site (by layer and head).
        direction: denoise patches clean values into the corrupt run, noise corrupt values into the clean run.
        samples: how many random steps of equal length make the null of each place.
        seed: of the random steps and of the bootstrap.

    Raises:
        Refused: a site that is neither, or a corruption that does not change the metric.
    """
    row = site_row(site)
    by_head = row.head_axis is not None
    if row.scope != "layer" or (not by_head and row.axes != _STREAM):
        why = f"its axes are {row.axes}" if row.scope == "layer" else "it has no layers"
        raise Refused(f"patching site {site!r}", why, "use a stream site such as resid_pre, or a head site such as z")
    x = exchange(model, task, site, direction)
    places = _heads(model, x.own, site) if by_head else _cells(x.target, x.own, site)
    real, null = _variants(x.own, x.donor, places, samples, seed)
    effects = (sweep(model, x.target, [*real, *null], measured(x.bound)) - x.baseline).float().cpu()
    layers, second = x.own.layers(site), len(places) // len(x.own.layers(site))
    each = effects[: len(real)].reshape(len(layers), second, -1)
    mean, unit = each.mean(-1), x.bound.unit
    names = _head_names(model, x.own, site) if by_head else position_names(x.bound.clean)
    return (HeadEffects if by_head else PositionEffects)(
        effect=mean,
        interval=bootstrap_mean(each.movedim(-1, 0), seed=seed),
        null=effects[len(real) :].mean(-1).reshape(samples, len(layers), second).movedim(0, -1),
        recovered=mean / x.gap,
        clean=x.clean.cpu(),
        corrupt=x.corrupt.cpu(),
        labels={"layer": layers, "head" if by_head else "position": names, "bound": BOUNDS},
        units={"effect": unit, "interval": unit, "null": unit, "recovered": "share of clean − corrupt"},
        record=x.notes() | ({} if by_head else {"changed positions": _changed(x.bound)}),
    )


def _cells(tokens: Tokens, acts: Activations, site: str) -> list[Address]:
    return [Address(site, i, None, p) for i in acts.layers(site) for p in positions(tokens)]


def _changed(bound: Bound) -> list[int]:
    """Indices into the position axis where any corrupt prompt has another token."""
    rows = range(len(bound))
    pairs = [(bound.clean.row(i).ids[0], bound.corrupt.row(i).ids[0]) for i in rows]
    return [n for n, p in enumerate(positions(bound.clean)) if any(bool(a[p] != b[p]) for a, b in pairs)]


def _heads(model: Model, acts: Activations, site: str) -> list[Address]:
    return [Address(site, i, h) for i in acts.layers(site) for h in range(_count(model, site))]


def _head_names(model: Model, acts: Activations, site: str) -> list[str]:
    prefix = "kv " if site_row(site).head_axis == "kv_head" else ""
    return [f"{prefix}{h}" for h in range(_count(model, site))]


def _count(model: Model, site: str) -> int:
    return model.sizes()[str(site_row(site).head_axis)]


def _variants(
    own: Activations, other: Activations, places: Sequence[Address], samples: int, seed: int
) -> tuple[list[list[Edit]], list[list[Edit]]]:
    """One edit a place with the other run's value, and `samples` times one with a random step of equal length."""
    g = generator(seed)
    real: list[list[Edit]] = [[Replace(a, other[str(a)])] for a in places]
    null: list[list[Edit]] = []
    for _ in range(samples):
        for a in places:
            old, step = own[str(a)], other[str(a)].float() - own[str(a)].float()
            noise = torch.randn(step.shape, generator=g).to(step.device)
            noise *= step.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
            null.append([Replace(a, old + noise.to(old.dtype))])
    return real, null
