"""Which places carry the difference between the clean and the corrupt prompt?

Activation patching (Vig et al. 2020, arXiv:2004.12265; Meng et al. 2022, arXiv:2202.05262; Zhang & Nanda 2024,
arXiv:2309.16042). In `denoise`, the corrupt prompt runs with one activation taken from the clean run: what suffices to
bring the answer back. In `noise`, the clean prompt runs with one activation from the corrupt run: what is necessary.

* `effect` = metric(patched) − metric(unpatched), mean over prompts, in the metric's unit; positive means more answer.
  `recovered` = mean effect / mean(clean − corrupt): 1 is all of the difference, and `noise` makes it negative.
* `site` is a pattern. A stream site (`resid_pre`, `attn_out`, `mlp_out` …) is patched at one layer and position:
  [layer, position]. A site with heads or neurons (`z`, `q`, `pattern`, `mlp_post` …) at one layer and unit, at all
  positions at once: [layer, head], [layer, neuron]. `by` cuts such a site by position or by both: [layer, head,
  position]. `z.5` is one layer; a pattern that names units or positions itself (`z.*.3`, `mlp_post.2.17@-1`), or
  several patterns, give a list: [node].
* `window`: attn_out, mlp_out or ssm.out in the layers [l − w // 2, l − w // 2 + w) together, beside layer l alone
  (`single`).
* `metrics`: further metrics of the same runs [metric, …], each in its own unit, with interval and null.
* `interval`: 95 %, over prompts. Control (`null`): the same place receives, instead of the other run's value, a
  step of the same length in a random direction (of a neuron: of random sign). Of more than `null_cells` places,
  so many drawn at random make one null for all: every place is held against the band pooled over them.
* Known failures: single patches miss redundant components; denoising overstates a place that everything passes;
  windows restore more than single layers add up to.
* Equivalences (tests): patching `resid_pre` of layer 0 at every changed position at once gives the other run; with
  `resid_post` at the last layer and position the recovery is 1; a window of 1 is the single layer.
* Cost: one forward a cell and sample, from the patched layer on; none for a cell whose value is the same in both runs
  of every prompt, whose effect is 0. Prompts go in parts of a bounded size, so that memory does not grow with their
  number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from cutaway.core.address import Address, Pattern, listed
from cutaway.core.method import method
from cutaway.core.progress import part
from cutaway.core.refuse import Call, Keyword, Refused
from cutaway.core.sites import WRITERS
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.interventions.ablation_values import RandomStep
from cutaway.interventions.components import positions
from cutaway.interventions.effects import Effects
from cutaway.interventions.grid import By, Cells, cells, named, window_of
from cutaway.interventions.null_cells import NULL_CELLS, draw_cells, null_cells_record
from cutaway.interventions.paired_runs import (
    Direction,
    PairedRuns,
    between,
    corruption_record,
    difference,
    first_changed,
)
from cutaway.models.access.reading import jointly
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

_PART_BYTES = 1 << 32  # of both runs' activations at the exchanged sites


@dataclass(frozen=True)
class Run:
    """Effects on one part of the prompts.

    Attributes:
        x: the two runs.
        real: effects of the cells [cell prompt metric].
        alone: effects of the cells' layers alone, where cells are windows [cell prompt metric].
        null: effects of random steps [sample cell prompt metric].
    """

    x: PairedRuns
    real: Tensor
    alone: Tensor
    null: Tensor


@method(
    answers="Which places carry the difference between the clean and the corrupt prompt?",
    paper="Zhang & Nanda 2024, arXiv:2309.16042; Meng et al. 2022, arXiv:2202.05262",
    cost="prompts * (9 + min(window, 2) * cells + samples * min(null_cells or cells, cells)) * F",
    control="random_direction",
    rung="interventional",
    fills=("recovered", "corrupt", "single", "metrics", "gap", "changed"),
)
def activation(
    model: Model,
    task: Task,
    /,
    *,
    site: tuple[Pattern, ...] = ("resid_pre",),
    by: By = "auto",
    direction: Direction = "denoise",
    window: int = 1,
    metrics: tuple[str, ...] = (),
    samples: int = 4,
    null_cells: int = NULL_CELLS,
    seed: int = 0,
) -> Effects:
    """Exchange one activation at a time between the clean and the corrupt run.

    Args:
        site: a pattern such as resid_pre, z, z.5 or mlp_post.2.17@-1, or several.
        by: cut a site by position, by unit (head or neuron), or by both; auto takes units where there are any.
        direction: denoise patches clean values into the corrupt run, noise corrupt values into the clean run.
        window: how many layers are patched together, centred on each (attn_out, mlp_out and ssm.out only).
        metrics: further metrics to read in the same runs (logit_diff, log_prob, prob, kl, rank …).
        samples: how many random steps of equal length make the null of each place.
        null_cells: at how many places, drawn at random, random steps are made; NaN elsewhere (0: at all of them).
        seed: of the random steps.

    Raises:
        Refused: a place that cannot be exchanged, or a corruption that does not change the metric.
    """
    what = listed(site)
    if window < 1 or (window > 1 and not f"{what}.".startswith(tuple(f"{w}." for w in WRITERS))):
        why = "nothing would be patched" if window < 1 else "a window is for what the sublayers write"
        raise Refused(
            (Call("activation", {"window": window}), f" of {what!r}"),
            why,
            ("use ", Keyword("window", 1), f", or one of {', '.join(WRITERS)}"),
        )
    bound = task.bind(model)
    grid = cells(model, bound, site[0], by) if len(site) == 1 else None
    if grid is None and (by != "auto" or window > 1):
        why = "the pattern names its places itself"
        raise Refused(
            Call("activation", {"site": what, "by": by, "window": window}),
            why,
            ("leave out ", Keyword("by"), " and ", Keyword("window")),
        )
    places = grid.addresses() if grid is not None else _named_places(model, bound, site)
    wide = [[a] for a in places] if grid is None or window == 1 else _windows(grid, window)
    alone = [[a] for a in places] if window > 1 else []
    read = [bound, *(bound.measured_by(name, model) for name in metrics)]
    parts = [[b.rows(rows) for b in read] for rows in _parts(model, bound, places)]
    both = [_values(model, b) for b, *_ in parts]
    difference(task, *(torch.cat(values) for values in zip(*both, strict=True)))
    chance = generator(seed)
    runs, chosen = list[Run](), list[int]()
    for n, own in enumerate(parts):
        with part(n, len(parts)):
            runs.append(_run(model, own, task.corruption, wide, alone, direction, samples, null_cells, chance, chosen))
    return _result(task, read, runs, grid, places, null_cells_record(len(chosen), len(wide)))


def _values(model: Model, bound: Bound) -> list[Tensor]:
    """Return the metric of every clean and every corrupt prompt."""
    return [model.measure(t, bound.measure).float() for t in (bound.clean, bound.corrupt)]


def _named_places(model: Model, bound: Bound, site: Sequence[Pattern]) -> list[Address]:
    """Return the cells of several patterns, or of one that names its units or positions."""
    found: list[Address] = []
    for pattern in site:
        grid = cells(model, bound, pattern)
        found += model.places(pattern) if grid is None else grid.addresses()
    return list(dict.fromkeys(found))


def _windows(grid: Cells, window: int) -> list[list[Address]]:
    """For every cell, its place in the layers around it."""
    return [[replace(a, layer=i) for i in window_of(a.layer or 0, window, grid.layers)] for a in grid.addresses()]


def _parts(model: Model, bound: Bound, places: Sequence[Address]) -> list[list[int]]:
    """Return the prompts in parts whose activations fit the bound on memory."""
    length = bound.clean.ids.shape[1]
    one = sum(max(model.shape.d_model, model.anatomy.held(a.row, length)) for a in {a.place for a in places})
    size = max(1, _PART_BYTES // (8 * length * one))
    return [list(range(at, min(at + size, len(bound)))) for at in range(0, len(bound), size)]


def _run(
    model: Model,
    read: Sequence[Bound],
    corruption: str,
    wide: Sequence[Sequence[Address]],
    alone: Sequence[Sequence[Address]],
    direction: Direction,
    samples: int,
    null_cells: int,
    chance: torch.Generator,
    chosen: list[int],
) -> Run:
    """Exchange every cell in one part of the prompts; the first part writes into `chosen` which cells make the null."""
    sites = list(dict.fromkeys(a.place for places in wide for a in places))
    x = between(model, read[0], sites, direction, corruption)
    since = first_changed(model, read[0])
    real: list[list[Edit]] = [[Replace(a, x.donor[str(a)], since=since) for a in places] for places in [*wide, *alone]]
    seeds = torch.randint(1 << 62, (samples, len(wide), max(map(len, wide))), generator=chance).tolist()
    moves = {a: not torch.equal(x.own[a], x.donor[a]) for a in {str(a) for places in wide for a in places}}
    some = [n for n, places in enumerate(wide) if any(moves[str(a)] for a in places)]  # no step has no effect
    if not chosen:
        drawn = draw_cells(some, null_cells, chance)
        chosen += drawn if len(drawn) < len(some) else range(len(wide))
    stepped = sorted({*some} & {*chosen})
    null: list[list[Edit]] = [
        [RandomStep(a, x.own[str(a)], x.donor[str(a)], n, since=since) for a, n in zip(wide[c], each[c], strict=False)]
        for each in seeds
        for c in stepped
    ]
    measure = jointly([b.measure for b in read])
    base = x.baseline[:, None] if len(read) == 1 else model.measure(x.target, measure)
    some = [*some, *(len(wide) + n for n, (a,) in enumerate(alone) if moves[str(a)])]
    effects, steps = torch.zeros(len(real), len(base), len(read)), torch.zeros(samples, len(wide), len(base), len(read))
    if some:
        found = (sweep(model, x.target, [*(real[n] for n in some), *null], measure) - base).float().cpu()
        effects[some] = found[: len(some)]
        steps[:, stepped] = found[len(some) :].unflatten(0, (samples, len(stepped)))
    steps[:, sorted({*range(len(wide))} - {*chosen})] = torch.nan
    return Run(x, effects[: len(wide)], effects[len(wide) :], steps)


def _result(
    task: Task,
    read: Sequence[Bound],
    runs: Sequence[Run],
    grid: Cells | None,
    places: Sequence[Address],
    notes: dict[str, str],
) -> Effects:
    bound = read[0]
    clean, corrupt = (torch.cat([getattr(r.x, n) for r in runs]).cpu() for n in ("clean", "corrupt"))
    each, alone = (torch.cat([getattr(r, n) for r in runs], dim=1).movedim(-1, 0) for n in ("real", "alone"))
    null = torch.cat([r.null for r in runs], dim=2).mean(2).movedim(0, -1).movedim(1, 0)  # [metric cell sample]
    shape = grid.shape if grid is not None else (len(places),)
    spread = [mean_interval(e.T).unflatten(0, shape) for e in each]
    mean, null = each.mean(-1).unflatten(1, shape), null.unflatten(1, shape)
    found = {"effect": mean[0], "interval": spread[0], "null": null[0]}
    if len(alone[0]):
        found["single"] = alone[0].mean(-1).unflatten(0, shape)
        found["single_interval"] = mean_interval(alone[0].T).unflatten(0, shape)
    units = dict.fromkeys(found, bound.unit) | {"recovered": "share of clean − corrupt"}
    gap = float((clean - corrupt).mean())
    labels: dict[str, list[Any]] = grid.labels() if grid is not None else {"node": named(places, bound)}
    if len(read) > 1:
        found |= {"metrics": mean[1:], "metrics_interval": torch.stack(spread[1:]), "metrics_null": null[1:]}
        labels["metric"] = [f"{b.readout.name} ({b.unit})" for b in read[1:]]
    return Effects(
        grid=grid.axes if grid is not None else ("node",),
        **cast("dict[str, Any]", {n: t.clone() for n, t in found.items()}),
        recovered=mean[0] / gap,
        clean=clean,
        corrupt=corrupt,
        labels=labels | {"bound": BOUNDS},
        units=units,
        gap=gap,
        changed=_changed(bound) if grid is None or grid.place else None,
        reasons=one_prompt(len(bound), *(n for n in ("effect", "single", "metrics") if n in found)),
        record=corruption_record(task.corruption) | notes,
    )


def _changed(bound: Bound) -> tuple[int, ...]:
    """Return the indices into the position axis where any corrupt prompt has another token."""
    rows = range(len(bound))
    pairs = [(bound.clean.row(i).ids[0], bound.corrupt.row(i).ids[0]) for i in rows]
    return tuple(n for n, p in enumerate(positions(bound.clean)) if any(bool(a[p] != b[p]) for a, b in pairs))
