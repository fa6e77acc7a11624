"""What does the model lose without one component?

Ablation: one head, layer site, position or neuron at a time is replaced by a value that carries less, and the task is
measured again (zero and mean: Olsson et al. 2022; resample: Chan et al. 2022; optimal: Li & Janson 2024,
arXiv:2409.09951).

* `effect` = metric(ablated) − metric(clean), mean over prompts, in the metric's unit: negative where the component
  helps. A head site (`z`, `q`, `v` …) gives [layer, head], a neuron site (`mlp_post` …) [layer, neuron], a stream site
  (`mlp_out`, `attn_out`, `resid_pre` …) [layer]; with `each_position` heads and streams get a position axis too.
* `how`: `corrupt` takes the value in the prompt's corrupt partner, `resample` that in other prompts of the same length
  (mean effect over up to 4 of them), `zero` zeros, `mean` the mean over tokens, `position_mean` the mean at each
  position over prompts of the same length, and `optimal` the constant that costs the model's predictions least (KL),
  fitted on one half of the prompts; the effect, and all other fields, are then measured on the other half.
* `mean` and `optimal` leave out and in place each prompt's first token and special tokens, unless `sinks`.
  `resample` and `position_mean` leave out prompts whose length no other has; the record says how many.
* `interval`: 95 %, over prompts. Control (`null`): a step as long as the removal's, in a random direction,
  at `null_cells` places drawn at random where there are more.
* Known failures: zeros lie outside what later layers have seen, and removing a mean removes what every prompt shares;
  the size, and for small effects the sign, depend on `how`. Attention rests on first tokens, whose activations can be
  ten times as long as others: zeros there, or with `sinks` a mean, cost what has little to do with the task. Positions
  of prompts of the same length need not mean the same. Other components may stand in (see self_repair).
* Equivalences (tests): `corrupt` equals noise patching; any removal of `resid_post` at the last layer and position
  leaves the logits of the value that stands in; the optimal constant loses no more than the mean it started from.
* Cost: 1 + samples forwards a place, from its layer on (up to 4 + samples with `resample`); `optimal` adds `steps`
  forwards and backwards on half of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from cutaway.core.address import Address, component_axis
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.sites import site as site_row
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.interventions.ablation_values import Removal, ordinary, removal
from cutaway.interventions.components import positions
from cutaway.interventions.effects import Effects
from cutaway.interventions.null_cells import NULL_CELLS, draw_cells, null_cells_record, null_of_steps, random_steps
from cutaway.interventions.optimal_ablation import optimal_constants
from cutaway.interventions.spans import position_names
from cutaway.models.access.capture import Activations
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.task import Task

How = Literal["corrupt", "zero", "mean", "position_mean", "resample", "optimal"]


@method(
    answers="What does the model lose without one component?",
    paper="Li & Janson 2024, arXiv:2409.09951; Chan et al. 2022",
    cost="prompts * (5 + cells * (4 if how == 'resample' else 1) + samples * min(null_cells or cells, cells)) * F"
    " + (prompts * (3 + steps * cells) * (F + B) if how == 'optimal' else 0)",
    control="random_direction",
    rung="interventional",
    fills=(),
)
def ablate(
    model: Model,
    task: Task,
    /,
    *,
    site: str = "z",
    how: How = "corrupt",
    each_position: bool = False,
    layers: tuple[int, ...] = (),
    sinks: bool = False,
    steps: int = 40,
    samples: int = 4,
    null_cells: int = NULL_CELLS,
    seed: int = 0,
) -> Effects:
    """Remove one component at a time.

    Args:
        site: a head site (z, q, v …), a neuron site (mlp_post …) or a stream site (mlp_out, resid_pre …).
        how: what stands in for the removed value.
        each_position: remove heads and streams at one position at a time instead of at all positions at once.
        layers: only these; all if empty.
        sinks: with mean and optimal, average in and replace first and special tokens too, as the others always do.
        steps: of the fit of optimal constants.
        samples: how many random steps of equal length make the null of each place.
        null_cells: at how many places, drawn at random, random steps are made; NaN elsewhere (0: at all of them).
        seed: of the donors and the random steps.

    Raises:
        Refused: a site that has no positions, or a baseline that these prompts or this site do not allow.
    """
    axes, chosen = _axes(site, each_position), _layers(model, site, layers)
    if how == "optimal":
        r, notes = _optimal(model, task, site, axes, chosen, steps, sinks)
    else:
        r, notes = removal(model, task.bind(model), [Address(site, i) for i in chosen], how, seed, sinks), {}
    places = _places(model, site, axes, chosen, r.bound.clean)
    count, drawn = len(places), draw_cells(range(len(places)), null_cells, generator(seed))
    chance = [[r.random(places[i], own, s)] for i, s, own in random_steps(drawn, count, samples, seed)]
    values, random = r.swept(model, lambda donor: [[r.edit(a, donor)] for a in places], chance)
    null = null_of_steps((random - r.clean.cpu()).mean(-1), drawn, count, samples)
    names = {"position": position_names(r.bound)} if "position" in axes else {}
    each = (values - r.clean.cpu()).movedim(1, 0).reshape(len(r.bound), *_form(places))
    unit = r.bound.unit
    return Effects(
        grid=axes,
        effect=each.mean(0),
        interval=mean_interval(each),
        null=null.reshape(samples, *each.shape[1:]).movedim(0, -1).clone(),
        clean=r.clean.cpu(),
        labels={"layer": chosen, "bound": BOUNDS, **names},
        units={"effect": unit, "interval": unit, "null": unit, "clean": unit},
        reasons=one_prompt(len(r.bound), "effect"),
        record=r.record() | notes | null_cells_record(len(drawn), count),
    )


def _axes(site: str, by_position: bool) -> tuple[str, ...]:
    """Return the axes along which a site is removed."""
    row = site_row(site)
    if row.scope != "layer" or not row.writable or not row.axes.startswith("batch position ") or site == "router":
        why = "it is no activation of one layer with positions that can be written"
        raise Refused(f"ablation of site {site!r}", why, "use z, mlp_post, or a stream site such as mlp_out or ssm.out")
    unit = component_axis(row)
    if unit is None:
        return ("layer", "position") if by_position else ("layer",)
    if unit != "neuron":
        return ("layer", "head", "position") if by_position else ("layer", "head")
    if by_position:
        why = "a neuron is removed at all positions at once"
        raise Refused(
            f"ablation of site {site!r} by position",
            why,
            ("leave ", Keyword("each_position", False), ", or use mlp_out"),
        )
    return ("layer", "neuron")


def _layers(model: Model, site: str, wanted: tuple[int, ...]) -> list[int]:
    there = [a.layer for a in model.places(site) if a.layer is not None]
    if not set(wanted) <= set(there):
        have = f"{site} is in layers {there[0]} to {there[-1]}"
        raise Refused(f"layers {','.join(map(str, wanted))}", have, "write for example 0,3,5")
    return sorted(set(wanted)) or there


def _places(model: Model, site: str, axes: Sequence[str], layers: list[int], tokens: Tokens) -> list[Address]:
    """Return the address of each number of the result, in the order of its axes."""
    unit = component_axis(site_row(site))
    units = range(model.sizes()[unit]) if unit is not None else [None]
    at = positions(tokens) if "position" in axes else [None]
    return [Address(site, i, u, p) for i in layers for u in units for p in at]


def _form(places: list[Address]) -> list[int]:
    """Return the shape in which the places lie."""
    parts = [{a.layer for a in places}, {a.unit for a in places}, {a.position for a in places}]
    return [len(p) for p in parts if p != {None}]


def _optimal(
    model: Model, task: Task, site: str, axes: tuple[str, ...], layers: list[int], steps: int, sinks: bool
) -> tuple[Removal, dict[str, Any]]:
    """Fit constants on one half of the prompts, to replace the activations of the other half."""
    row = site_row(site)
    if axes not in (("layer", "head"), ("layer",)) or row.axes.split()[-1] == "state":
        why = "a constant is fitted for a head or a whole layer"
        raise Refused(
            f"optimal ablation of site {site!r} here", why, ("use a head site, or ", Keyword("each_position", False))
        )
    if steps < 1:
        raise Refused(
            ("optimal ablation with ", Keyword("steps", 0)),
            "nothing would be fitted",
            ("use ", Keyword("how", "mean"), ", or more steps"),
        )
    fitted, held = (part.bind(model) for part in task.split(0.5, seed=0))
    places = _places(model, site, axes, layers, held.clean)
    constants, curve = optimal_constants(model, fitted.clean, ordinary(model, fitted.clean, sinks), places, steps)
    r = removal(model, held, places, "mean", sinks=sinks)
    where, stand = ordinary(model, held.clean, sinks), {a.place: r.own[str(a.place)].clone() for a in places}
    for a, c in constants.items():
        part = stand[a.place]
        (part if a.unit is None else part[:, :, a.unit])[where] = c.to(part.dtype)
    notes = {
        "stands in": "a constant fitted to keep the predictions of other prompts (KL at the last position)",
        "split": f"fitted on {len(fitted)} prompts, measured on {len(held)} others (task.split(0.5, seed=0))",
        "loss of the mean and after the fit, in nats": [float(curve[:, 0].mean()), float(curve[:, -1].mean())],
    }
    return replace(r, stands=(Activations(stand, held.clean),)), notes
