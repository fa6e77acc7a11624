"""First-order estimates of patching effects: metric gradients at the patched sites times the activation difference.

Estimate of a place = Σ slope · (donor − own) over its tensor, where `slope` is a gradient, or its substitute.
Prompts go in parts, forward and backward, so that memory does not grow with their number: to a bound on their
activations, and half as many where memory runs out. Every number is one prompt's own, random steps included, so that
no result depends on the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.core.address import Address, Pattern, listed, unit_axis
from cutaway.core.out_of_memory import in_halves
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.sites import Site
from cutaway.core.sites import site as site_row
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.interventions.ablation_values import RandomStep
from cutaway.interventions.audit import STATISTICS, Audit, audit, rounding
from cutaway.interventions.components import positions
from cutaway.interventions.effects import Effects
from cutaway.interventions.grid import By, Cells, cells, named
from cutaway.interventions.paired_runs import Direction, PairedRuns, corruption_record, difference, first_changed, run
from cutaway.models.access.backward import Attention, Cut, fitting, gradients
from cutaway.models.access.capture import Activations
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.sweep.processes import processes
from cutaway.models.tokens import Tokens
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

ESTIMATED = ("recovered", "corrupt", "exact", "agreement", "gap")  # optional fields that every estimate can fill
_PART_BYTES = 1 << 31  # of one part's activations, with what its graph keeps for the backward pass
_STILL = 4  # rounding steps of a value, by which two runs of the same tokens may differ
_GRAPH = 8  # tensors of a block's width that a block keeps for it


@dataclass(frozen=True)
class Nodes:
    """The places that one pattern means, in order: the cells of a grid, or places that the pattern names itself."""

    places: tuple[Address, ...]
    grid: Cells | None

    @property
    def site(self) -> str:
        """Their site."""
        return self.places[0].site

    @cached_property
    def whole(self) -> list[Address]:
        """The addresses captured for them: the site, layer by layer."""
        return list(dict.fromkeys(a.place for a in self.places))

    @property
    def units(self) -> bool:
        """True if each is one unit."""
        return self.places[0].unit is not None

    @property
    def placed(self) -> bool:
        """True if each is at one position."""
        return self.places[0].position is not None


Step = Callable[[Activations], Mapping[Address, Tensor]]
Take = Callable[[Model, PairedRuns, Nodes, Mapping[str, Tensor]], Step]


def nodes(model: Model, bound: Bound, site: Sequence[Pattern], by: By = "auto") -> list[Nodes]:
    """Return the places that patterns mean; a place meant twice counts once.

    Raises:
        Refused: a place that cannot be exchanged, or `by` for a pattern that names its places itself.
    """
    out: list[Nodes] = []
    seen: dict[Address, None] = {}
    for pattern in site:
        grid = cells(model, bound, pattern, by)
        if grid is None and by != "auto":
            why = f"the pattern {pattern!r} names its places itself"
            what = f"cells of {listed(site)!r} by {by}"
            raise Refused(what, why, ("leave out ", Keyword("by"), ", or name whole sites"))
        found = grid.addresses() if grid is not None else model.places(pattern)
        new = tuple(a for a in found if a not in seen)
        seen |= dict.fromkeys(new)
        if new:
            out.append(Nodes(new, grid if len(new) == len(found) else None))
    return out


def slopes(
    model: Model,
    bound: Bound,
    sites: Sequence[str | Address],
    direction: Direction,
    corruption: str = "",
    *,
    beside: Sequence[str | Address] = (),
    cuts: Sequence[Cut] = ((),),
    relevance: Attention | None = None,
) -> tuple[PairedRuns, list[Activations]]:
    """Run two forwards (donor and target) and one backward per cut, for all sites and these prompts at once.

    `beside` are further sites at which slopes and own activations, but no donor values, are needed.

    Raises:
        Refused: no such site, no slope somewhere, or too little memory.
    """
    denoise = direction == "denoise"
    target, giver = _runs(bound, direction)
    given, donor = run(model, giver, sites, bound)
    with model.edited():
        places = model.places([*sites, *beside])
        value, found, own = gradients(model.anatomy, target, places, bound.measure, cuts, relevance)
    value = value.float()
    clean, corrupt = (given, value) if denoise else (value, given)
    gap = float((clean - corrupt).mean())
    return PairedRuns(bound, target, own, donor, clean, corrupt, value, gap, corruption), found


def _runs(bound: Bound, direction: Direction) -> tuple[Tokens, Tokens]:
    """Return the run that is patched, and the one that gives."""
    return (bound.corrupt, bound.clean) if direction == "denoise" else (bound.clean, bound.corrupt)


def tangent(model: Model, x: PairedRuns, n: Nodes, donor: Mapping[str, Tensor]) -> Step:
    """Return the step whose products are slope · (donor − own), at whole sites."""
    return lambda slope: {a: slope[str(a)].float() * (donor[str(a)].float() - x.own[str(a)].float()) for a in n.whole}


def cellwise(n: Nodes, products: Mapping[Address, Tensor], tokens: Tokens) -> Float[Tensor, "cell prompt"]:
    """Sum products at whole sites over the entries of each place."""
    row, grid = site_row(n.site), n.grid
    if grid is not None:
        columns = torch.stack([tokens.column(p) for p in positions(grid.tokens)], dim=1) if grid.place else None
        return torch.cat([_held(row, products[a], n.units, columns).flatten(1) for a in n.whole], dim=1).T
    out = []
    for a in n.places:
        column = tokens.column(a.position)[:, None] if a.position is not None else None
        held = _held(row, products[a.place], n.units, column)
        out.append((held[:, a.unit] if a.unit is not None else held).reshape(len(tokens)))
    return torch.stack(out)


def _held(row: Site, product: Tensor, units: bool, columns: Tensor | None) -> Tensor:
    """Sum a product over all but its prompts, its units if they are cut, and the columns of chosen positions."""
    axes, x = row.axes.split(), product.float()
    kept = [
        a for a in axes if a == "batch" or (units and a == unit_axis(row)) or (a == "position" and columns is not None)
    ]
    gone = [d for d, a in enumerate(axes) if a not in kept]
    x = x.sum(gone) if gone else x
    if columns is None:
        return x
    x = x.movedim(kept.index("position"), -1)
    where = columns.to(x.device)
    return x.gather(-1, where[:, None].expand(-1, x.shape[1], -1) if units else where)


def random_donor(x: PairedRuns, n: Nodes, chances: Sequence[torch.Generator]) -> dict[str, Tensor]:
    """Return the values as far from one's own as the donor's, in random directions; every prompt has its own source
    of chance.
    """
    out, axes = {}, site_row(n.site).axes.split()
    signs = n.units and axes[-1] == unit_axis(site_row(n.site))  # one dimension each: only the sign can be random
    for a in map(str, n.whole):
        old, step = x.own[a], x.donor[a].float() - x.own[a].float()
        noise = torch.stack([torch.randn(step.shape[1:], generator=g) for g in chances]).to(step.device)
        if signs:
            out[a] = old + (noise.sign() * step.abs()).to(old.dtype)
        else:
            out[a] = old + (noise * step.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)).to(old.dtype)
    return out


def only_effect(n: Nodes, each: Iterable[Float[Tensor, "cell prompt"]]) -> Float[Tensor, "quantity cell prompt"]:
    """Return the estimates of the first backward pass."""
    return next(iter(each))[None]


@dataclass(frozen=True)
class EstimateRule:
    """Definition of one kind of estimate.

    Attributes:
        take: turns slopes into products with the step.
        reads: turns the cells' sums, one per backward pass, into quantities; the first is the effect.
        beside: further sites that it needs.
        cuts: places where each backward pass is cut.
        relevance: rule for attention in place of its gradient, if any.
    """

    take: Take = tangent
    reads: Callable[[Nodes, Iterable[Tensor]], Tensor] = only_effect
    beside: Sequence[str | Address] = ()
    cuts: Sequence[Cut] = ((),)
    relevance: Attention | None = None

    def quantities(
        self, model: Model, x: PairedRuns, n: Nodes, donor: Mapping[str, Tensor], found: Sequence[Activations]
    ) -> Float[Tensor, "quantity cell prompt"]:
        """Return the quantities estimated for one donor, per prompt."""
        step = self.take(model, x, n, donor)
        return self.reads(n, (cellwise(n, step(slope), x.target) for slope in found)).cpu()


@dataclass(frozen=True)
class _Part:
    """Estimates of one part of the prompts; the null is a sum over them; `runs` is kept if it is all prompts."""

    rows: Sequence[int]
    runs: PairedRuns | None
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    values: Float[Tensor, "quantity cell prompt"]
    null: Float[Tensor, "quantity cell sample"]
    moves: Bool[Tensor, "cell"]


@dataclass(frozen=True)
class Estimates:
    """Estimated quantities of all places, prompt by prompt, with what chance alone gives in the mean.

    `moves` tells the places whose value differs between the two runs of any prompt.
    """

    bound: Bound
    nodes: Sequence[Nodes]
    direction: Direction
    corruption: str
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    gap: float
    values: Float[Tensor, "quantity cell prompt"]
    null: Float[Tensor, "quantity cell sample"]
    moves: Bool[Tensor, "cell"]
    parts: Sequence[Sequence[int]]
    runs: PairedRuns | None

    @property
    def places(self) -> list[Address]:
        """Every place, in order."""
        return [a for n in self.nodes for a in n.places]

    @property
    def grid(self) -> Cells | None:
        """The grid, where one pattern makes one."""
        return self.nodes[0].grid if len(self.nodes) == 1 else None

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names of the places."""
        return self.grid.axes if self.grid is not None else ("node",)

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return self.grid.shape if self.grid is not None else (len(self.places),)

    def labels(self, statistics: Sequence[str]) -> dict[str, list[Any]]:
        """Return the entries of every axis of a result."""
        own = self.grid.labels() if self.grid is not None else {"node": named(self.places, self.bound)}
        return own | {"bound": BOUNDS} | ({"statistic": list(statistics)} if statistics else {})


def estimates(
    model: Model,
    task: Task,
    site: Sequence[Pattern],
    by: By,
    direction: Direction,
    rule: Callable[[list[Nodes]], EstimateRule],
    samples: int,
    seed: int,
) -> Estimates:
    """Estimate all places of one or several patterns, in parts of the prompts.

    Raises:
        Refused: a place that cannot be exchanged or has no slope, a corruption that does not change the metric, or a
            single prompt that does not fit in memory.
    """
    bound = task.bind(model)
    wanted, done = nodes(model, bound, site, by), list[_Part]()
    how, n = rule(wanted), len(bound)
    seeds = torch.randint(1 << 62, (n,), generator=generator(seed)).tolist()

    def work(rows: Sequence[int]) -> None:
        part, sites = bound.rows(rows), list(dict.fromkeys(a for w in wanted for a in w.whole))
        x, found = slopes(
            model, part, sites, direction, task.corruption, beside=how.beside, cuts=how.cuts, relevance=how.relevance
        )
        chances, values, null = [generator(seeds[i]) for i in rows], [], []
        with fitting(x.target), torch.no_grad():
            for w in wanted:
                values.append(how.quantities(model, x, w, x.donor, found))
                drawn = (random_donor(x, w, chances) for _ in range(samples))
                null.append(torch.stack([how.quantities(model, x, w, d, found).sum(-1) for d in drawn], dim=-1))
            moves = torch.cat([_moves(model, x, w) for w in wanted])
        kept = x if len(rows) == n else None
        done.append(_Part(rows, kept, x.clean.cpu(), x.corrupt.cpu(), torch.cat(values, 1), torch.cat(null, 1), moves))

    _in_parts(range(n), _size(model, bound, wanted, how), work)
    clean, corrupt = (torch.cat([getattr(p, name) for p in done]) for name in ("clean", "corrupt"))
    gap = difference(task, clean, corrupt)
    values, null = torch.cat([p.values for p in done], dim=-1), torch.stack([p.null for p in done]).sum(0) / n
    moves, parts = torch.stack([p.moves for p in done]).any(0), [p.rows for p in done]
    sides = (task.corruption, clean, corrupt, gap)
    return Estimates(bound, wanted, direction, *sides, values, null, moves, parts, done[0].runs)


def _moves(model: Model, x: PairedRuns, n: Nodes) -> Bool[Tensor, "cell"]:
    """Return True at the places whose value differs between the runs of any prompt by more than rounding: in a causal
    model at none before the first changed token.
    """
    start = x.target.column(0)[:, None] + first_changed(model, x.bound)
    later = torch.arange(x.target.ids.shape[1], device=start.device) >= start
    placed = "position" in site_row(n.site).axes.split()

    def summed(values: Mapping[Address, Tensor]) -> Float[Tensor, "cell prompt"]:
        if placed:  # [batch position …]
            values = {a: t * later.reshape(*later.shape, *[1] * (t.ndim - 2)).to(t) for a, t in values.items()}
        return cellwise(n, values, x.target)

    own = {a: x.own[str(a)].float() for a in n.whole}
    step = summed({a: (x.donor[str(a)].float() - t).abs() for a, t in own.items()})
    least = _STILL * torch.finfo(x.own[str(n.whole[0])].dtype).eps
    return (step > least * summed({a: t.abs() for a, t in own.items()})).any(1).cpu()


def _in_parts(rows: Sequence[int], size: int, work: Callable[[Sequence[int]], None]) -> None:
    """Call `work` on some prompts at a time, and on half as many where memory runs out.

    Processes that share a plan must cut it alike, so none of them halves on its own.
    """
    if processes() == 1:
        in_halves(rows, size, work)
        return
    for at in range(0, len(rows), size):
        work(rows[at : at + size])


def _size(model: Model, bound: Bound, wanted: Sequence[Nodes], how: EstimateRule) -> int:
    """Return the number of prompts per part for which activations fit the bound on memory."""
    length = bound.clean.ids.shape[1]
    read = {a for n in wanted for a in n.whole} | {a.place for a in model.places(list(how.beside))}
    one = sum(model.anatomy.held(a.row, length) for a in read)
    graph = _GRAPH * model.shape.n_layers * model.anatomy.widest(length)
    # Own and donor values, slopes of every backward pass, and a random donor with its products.
    held = one * (4 + len(how.cuts))
    return max(1, _PART_BYTES // (model.dtype.itemsize * length * (graph + held)))


def audited(
    model: Model,
    e: Estimates,
    mean: Float[Tensor, "cell"],
    n: int,
    size: Float[Tensor, "cell"] | None = None,
    seed: int = 0,
    steps: int = 0,
) -> Audit | None:
    """Return the exact effects of patching `n` of the places, beside their estimates; None if none is asked for.

    Each of these places also receives `steps` random steps of the donor's length, the null of its exact effect.
    """
    if not n:
        return None
    least = rounding(model, torch.stack([e.clean, e.corrupt]))
    null = torch.full((len(mean), steps), torch.nan)

    def measure(chosen: list[int]) -> Float[Tensor, "chosen prompt"]:
        drawn = torch.randint(1 << 62, (steps, len(chosen)), generator=generator(seed)).tolist()
        found = _exact(model, e, [e.places[i] for i in chosen], drawn)
        null[chosen] = found[1:].mean(-1).T
        return found[0]

    done = audit(measure, mean, n, least, size, seed, e.moves)
    return replace(done, null=null) if steps else done


def _exact(
    model: Model, e: Estimates, places: Sequence[Address], steps: Sequence[Sequence[int]]
) -> Float[Tensor, "run cell prompt"]:
    """Measure the effects of patching some places, and after them those of random steps there, one list of seeds a
    run.
    """
    found: list[Tensor] = []
    whole = list(dict.fromkeys(a.place for a in places))

    def work(rows: Sequence[int]) -> None:
        part = e.bound.rows(rows)
        target, giver = _runs(part, e.direction)
        kept = e.runs if len(rows) == len(e.bound) else None
        donor = kept.donor if kept is not None else model.capture(giver, whole, logits=False)
        since = first_changed(model, part)
        edits: list[list[Edit]] = [[Replace(a, donor[str(a)], since=since)] for a in places]
        if steps:
            own = kept.own if kept is not None else model.capture(target, whole, logits=False)
            for a, n in [(a, n) for seeds in steps for a, n in zip(places, seeds, strict=True)]:
                edits.append([RandomStep(a, own[str(a)], donor[str(a)], n, since=since)])
        found.append(sweep(model, target, edits, part.measure).float().cpu())

    for rows in e.parts:
        _in_parts(rows, len(rows), work)
    base = e.corrupt if e.direction == "denoise" else e.clean
    return (torch.cat(found, dim=1) - base).unflatten(0, (1 + len(steps), len(places)))


def estimate_record(e: Estimates, done: Audit | None, ranked: str = "|estimate|") -> dict[str, Any]:
    """Return the entries of an estimate's record beyond its options."""
    checked: dict[str, Any] = {"audited": f"none of {len(e.places)} cells: none was asked for"}
    if done is not None:
        s = done.sample
        strata = ", ".join(f"{n} of {m}" for n, m in zip(s.taken, s.sizes, strict=True))
        cells = f"{len(s.chosen)} of {len(e.places)} cells ({strata})"
        if s.still:
            cells += f"; none of the {s.still} whose value is the same in both runs, and whose effect is 0"
        elif not e.moves.any():
            cells += "; no cell moves: every value is the same in both runs"
        checked = {"agreement": str(s), "audited": f"by ranks of {ranked}: {cells}"}
    return corruption_record(e.corruption) | {"effect is": "an estimate"} | checked


def reasons(e: Estimates, found: Iterable[str]) -> dict[str, str]:
    """Say why fields of an estimate have no interval or no null."""
    out = {"recovered": "its interval and null are those of effect, divided by clean − corrupt"}
    if "exact_null" not in found:
        out |= {"exact": "no null: it is measured as patching.activation does, whose null holds for it"}
    out |= one_prompt(len(e.bound), "effect", "score", "exact")
    return {name: why for name, why in out.items() if name in found}


def fields(e: Estimates, done: Audit | None) -> dict[str, Any]:
    """Return the fields that all estimates share, shaped as their axes are."""
    shape, effect = e.shape, e.values[0]
    mean = effect.mean(-1)
    tensors = {
        "effect": mean,
        "interval": mean_interval(effect.T),
        "null": e.null[0],
        "recovered": mean / e.gap,
    }
    whole: dict[str, Tensor] = {}
    if done is not None:
        tensors |= {"exact": done.exact, "exact_interval": done.exact_interval(len(mean))}
        tensors |= {"exact_null": done.null} if done.null is not None else {}
        whole = {"agreement": done.agreement, "agreement_interval": done.interval}
    return (
        {name: t.reshape(*shape, *t.shape[1:]).clone() for name, t in tensors.items()}
        | whole
        | {
            "clean": e.clean,
            "corrupt": e.corrupt,
            "gap": e.gap,
        }
    )


def units(e: Estimates, names: Iterable[str]) -> dict[str, str]:
    """Return the units of a result's fields."""
    plain = {"agreement", "agreement_interval", "gap"}
    return dict.fromkeys([n for n in names if n not in plain], e.bound.unit) | {"recovered": "share of clean − corrupt"}


def effects(model: Model, e: Estimates, *, audits: int, seed: int, steps: int = 0) -> Effects:
    """Return the estimates of all places as a result, audited."""
    done = audited(model, e, e.values[0].mean(-1), audits, seed=seed, steps=steps)
    found = fields(e, done)
    labels = e.labels(STATISTICS if done else ())
    why = reasons(e, found)
    return Effects(
        grid=e.axes, **found, labels=labels, units=units(e, found), reasons=why, record=estimate_record(e, done)
    )
