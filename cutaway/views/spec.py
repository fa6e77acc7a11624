"""Pictures: what is to be drawn, derived from a field and its axis names, for every medium alike.

    layer head · layer position · q_pos k_pos → heat      layer · step → line       position → strip
    component · edge · any other single axis → bars       no axis → number          further leading axes → panels
    one layer of very many neurons → bars                 edge, with source and target → graph

The interval (`interval`, or `<field>_interval`: the field's axes and `bound`) and the control (`null`, or
`<field>_null`: axes of the field and `sample`) are laid beside the values wherever the result has them.
A cell is marked only if its interval is off no effect (`Result.no_effect`, mostly 0) and it lies outside its control's
band (`band.py`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.views.axes import has_role
from cutaway.views.band import Band, band
from cutaway.views.graph_layout import MOST_EDGES, Layout, is_graph, is_structure, layout, titles
from cutaway.views.kinds import KINDS, kind_of
from cutaway.views.wording import amount, number, span, spoken, visible

Grid = tuple[tuple[float, ...], ...]

MOST_PANELS = 12


@dataclass(frozen=True)
class Picture:
    """A drawing: numbers on named rows and columns, with interval and control where the result has them.

    `limit` ends the colour scale (shared by all panels of a field). `control` describes the null band, `chance` the
    number of cells that leave it by chance alone (empty where cells are too few to tell, or on a curve); `neutral` is
    the value that means no effect.
    Bars and graphs have one column, rows sorted by size; a line has one row per curve; a strip has one row.
    """

    kind: str
    title: str
    panel: str
    unit: str
    row_axis: str
    column_axis: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Grid
    low: Grid | None
    high: Grid | None
    null_low: Grid | None
    null_high: Grid | None
    words: tuple[tuple[str, ...], ...] | None
    limit: float
    signed: bool
    control: str
    chance: str
    note: str
    layout: Layout | None = None
    neutral: float = 0.0

    def stands_out(self, r: int, c: int) -> bool | None:
        """Return True if a value's interval is off no effect and it lies outside its control's band.

        Where it has one of the two, that decides; None if it has neither.
        """
        value, verdicts = self.values[r][c], list[bool]()
        if self.low is not None and self.high is not None and not math.isnan(self.low[r][c] + self.high[r][c]):
            verdicts.append(self.low[r][c] > self.neutral or self.high[r][c] < self.neutral)
        if self.chance and self.null_low is not None and self.null_high is not None:
            low, high = self.null_low[r][c], self.null_high[r][c]
            if math.isnan(low + high):
                return None
            verdicts.append(not low <= value <= high)
        return all(verdicts) if verdicts and not math.isnan(value) else None

    @property
    def mark(self) -> str:
        """The meaning of `stands_out` here, in words; empty if it has none. `chance` says how often chance does it."""
        known = self.low is not None and any(not math.isnan(v) for row in self.low for v in row)
        without = f"interval without {amount(self.neutral, self.unit) if self.neutral else 0}" if known else ""
        if not self.chance:
            return without
        return f"{without}{' and ' if known else ''}outside the {self.control}"

    def place(self, r: int, c: int) -> str:
        """Return the row and column of one cell in words."""
        row = self.rows[r] if self.row_axis in ("", "component", "edge") else f"{spoken(self.row_axis)} {self.rows[r]}"
        column = f"{spoken(self.column_axis)} {self.columns[c]}" if self.column_axis else ""
        return " · ".join(p for p in (self.panel, row if self.row_axis else "", column) if p)

    def facts(self, r: int, c: int) -> list[str]:
        """Return the value, interval and control of one cell as lines of text."""
        value = amount(self.values[r][c], self.unit)
        word = f"“{self.words[r][c]}”, " if self.words else ""
        lines = [f"{word}{spoken(self.title)} {value}"]
        if self.low is not None and self.high is not None:
            lines.append(f"interval {span(self.low[r][c], self.high[r][c], self.unit)}")
        if self.null_low is not None and self.null_high is not None:
            lines.append(f"control {span(self.null_low[r][c], self.null_high[r][c], self.unit)}")
        return lines

    def extent(self) -> tuple[float, float]:
        """Return the finite range of everything drawn, with 0 in it unless the unit is a rank."""
        grids = [g for g in (self.values, self.low, self.high, self.null_low, self.null_high) if g is not None]
        found = [v for g in grids for row in g for v in row if math.isfinite(v)]
        if self.unit == "rank":
            return (1.0, max([2.0, *found]))
        low, high = min([0.0, *found]), max([0.0, *found])
        return (low, high) if high > low else (0.0, 1.0)


def fields(result: Result) -> list[str]:
    """Return the fields worth a picture of their own: no intervals, controls or ids that only carry words."""
    beside = {n for n, a in result.axes().items() if a and a[-1] in ("bound", "sample")}
    hidden = beside | {n for n in result.tensors() if is_structure(result, n)}
    drawn = [n for n in result.tensors() if n not in hidden and not _is_ids(result, n)]
    return drawn or [n for n in result.tensors() if n not in beside]


def valued(result: Result) -> tuple[list[str], list[str]]:
    """Return the fields worth a picture that have a value, the first if none has, and those that have none."""
    names, t = fields(result), result.tensors()
    some = [n for n in names if t[n].is_complex() or bool(t[n].isfinite().any())] or names[:1]
    return some, [n for n in names if n not in some]


def checked(result: Result, field: str | None) -> str:
    """Return the name of a field that can be drawn: the first one if None.

    Raises:
        Refused: no such field, or one without numbers.
    """
    field = field or fields(result)[0]
    if field not in result.tensors():
        raise Refused(
            f"a picture of {field!r}",
            f"{result.kind or type(result).__name__} has no such field",
            f"use one of {', '.join(fields(result))}",
        )
    if result.tensors()[field].is_complex():
        raise Refused(f"a picture of {field!r}", "its values are complex", "draw its magnitude")
    return field


def with_beside(result: Result, field: str) -> list[str]:
    """Return a field with its interval and its null, as far as the result has them."""
    beside = (_partner(result, field, "interval", "bound"), _partner(result, field, "null", "sample"))
    return [field, *(n for n in beside if n is not None)]


def interval_of(result: Result, field: str) -> Tensor | None:
    """Return the interval of a field, its bounds on the last axis, if the result has one."""
    name = _partner(result, field, "interval", "bound")
    if name is None or result.axes()[name][:-1] != result.axes()[field]:
        return None
    return result.tensors()[name].detach().float().cpu()


def pictures(
    result: Result,
    field: str | None = None,
    *,
    title: str = "",
    text: str = "",
    bars: int = 24,
    rows: int = 64,
    columns: int = 64,
    panels: int = MOST_PANELS,
    edges: int = MOST_EDGES,
) -> list[Picture]:
    """Return the pictures of one field, one per panel; entries with units of their own have a panel per unit.

    Args:
        result: what to draw.
        field: which tensor field; the first one drawn if None.
        title: the name above it; the field's if empty.
        text: field whose words are written into the cells; by default one that belongs to this field.
        bars: most bars shown, largest first.
        rows: most rows of a heat map; more are pooled by largest magnitude.
        columns: most columns of a heat map or points of a strip.
        panels: most panels; of more, those with the largest values.
        edges: most edges of a graph, largest first.

    Raises:
        Refused: no such field, or one without numbers.
    """
    field = checked(result, field)
    if len(parts := _by_unit(result, field)) > 1:
        sizes = {"bars": bars, "rows": rows, "columns": columns, "panels": panels, "edges": edges}
        return [p for _, part in parts for p in pictures(part, field, title=title, text=text, **sizes)]
    axes = result.axes()[field]
    ground = _ground(result, field)
    shape = dict(zip(axes, ground.shape, strict=True))
    names = {a: _names(result, a, n) for a, n in shape.items()}
    beside, note = _band(result, field, shape, curves=kind_of(result, field, shape)[0] == "line"), ""
    layers = _layers(ground, interval_of(result, field), beside)
    if len(axes) > 1 and has_role(axes[-1], "choice") and (axes[:-1] == ("position",) or len(axes) > 2):
        note = f"first of {ground.shape[-1]} by {axes[-1]}"
        axes, layers = axes[:-1], {n: t[..., 0] for n, t in layers.items()}
    words = _words(result, text or field, axes)
    finite = ground[torch.isfinite(ground)]
    kind, (lead, row_axis, column_axis) = kind_of(result, field, {a: shape[a] for a in axes})
    drawn = layout(result) if is_graph(result, field) else None
    if drawn is not None:
        bars, names["edge"] = edges, _edge_names(result)
        note = "pale nodes do not exceed their control" * any(b.weak for b in drawn.boxes)
    common = {
        "kind": kind,
        "title": title or field,
        "unit": result.units.get(field, ""),
        "row_axis": row_axis,
        "column_axis": column_axis,
        "rows": names.get(row_axis, ("",)),
        "columns": names.get(column_axis, ("",)),
        "limit": float(finite.abs().max()) if finite.numel() else 0.0,
        "signed": bool((finite < 0).any()),
        "note": note,
        "control": beside.says if beside else "",
        "chance": beside.chance if beside else "",
        "layout": drawn,
        "neutral": result.no_effect(field),
    }
    out = []
    for index, panel in _panels(lead, names, ground, panels):
        part = {n: _matrix(t, axes, lead, index, row_axis, column_axis) for n, t in layers.items()}
        shown = _cell_words(words, axes, lead, index, row_axis, column_axis) if words else None
        out.append(_fitted(part, {"panel": panel, "words": shown, **common}, bars, rows, columns))
    return _counted(out, math.prod(len(names[a]) for a in lead) - len(out), panels)


def aligned(value: float, picture: Picture) -> str:
    """Return a value with as many decimals as its neighbours in a column: three digits of the largest one."""
    percent = picture.unit == "probability"
    if not math.isfinite(value):
        return number(value)
    factor = 100 if percent else 1
    whole = picture.unit == "rank" or picture.limit <= 0
    places = 0 if whole else max(0, min(9, 2 - math.floor(math.log10(picture.limit * factor))))
    text = f"{value * factor:{'+' if picture.signed else ''}.{places}f}".replace("-", "−")
    return f"{text} %" if percent else text


def _layers(ground: Tensor, bounds: Tensor | None, beside: Band | None) -> dict[str, Tensor]:
    """Return the values of a field with their interval and their control's band, as far as there are any."""
    layers = {"values": ground}
    if bounds is not None:
        layers |= {"low": bounds[..., 0], "high": bounds[..., -1]}
    if beside is not None:
        layers |= {"null_low": beside.low, "null_high": beside.high}
    return layers


def _edge_names(result: Result) -> tuple[str, ...]:
    ends = (result.tensors()[n].tolist() for n in ("source", "target"))
    nodes = [f"{name} {title}".rstrip() for name, title in zip(result.labels["node"], titles(result), strict=True)]
    return tuple(f"{nodes[s]}→{nodes[t]}" for s, t in zip(*ends, strict=True))


def _is_ids(result: Result, field: str) -> bool:
    t = result.tensors()[field]
    return not t.is_floating_point() and field in result.labels and field not in result.sizes()


def _ground(result: Result, field: str) -> Tensor:
    """Return the numbers that colour the cells: the field, or for a field of ids the first field with the same axes."""
    tensors, axes = result.tensors(), result.axes()
    if _is_ids(result, field):
        same = (n for n, t in tensors.items() if axes[n] == axes[field] and t.is_floating_point())
        if (other := next(same, None)) is None:
            return torch.zeros(tensors[field].shape)
        return tensors[other].detach().float().cpu()
    return tensors[field].detach().float().cpu()


def _owner(result: Result, name: str) -> str | None:
    """Return the field that `interval` or `null` belongs to: the main one if the axes allow it, else the first that
    fits.
    """
    lead = result.axes()[name][:-1]
    exact = result.axes()[name][-1] == "bound"
    candidates = [n for n in result.tensors() if not set(result.axes()[n]) & {"bound", "sample"}]
    order = sorted(candidates, key=lambda n: n != result.main)
    fits = (n for n in order if (result.axes()[n] == lead if exact else _within(lead, result.axes()[n])))
    return next(fits, None)


def _within(few: tuple[str, ...], many: tuple[str, ...]) -> bool:
    return [a for a in many if a in few] == list(few)


def _partner(result: Result, field: str, kind: str, axis: str) -> str | None:
    named = [n for n in (f"{field}_{kind}", kind) if n in result.tensors() and result.axes()[n][-1:] == (axis,)]
    return next((n for n in named if n != kind or _owner(result, n) == field), None)


def _band(result: Result, field: str, shape: dict[str, int], curves: bool) -> Band | None:
    name = _partner(result, field, "null", "sample")
    if name is None or not _within(result.axes()[name][:-1], result.axes()[field]):
        return None
    null = result.tensors()[name].detach().float().cpu()
    if not null.numel():
        return None
    own, usual = result.record.get("controls"), str(result.record.get("control") or "random control")
    control = own.get(field, usual) if isinstance(own, dict) else usual
    return band(null, result.axes()[name], shape, str(control), curves)


def _words(result: Result, field: str, axes: tuple[str, ...]) -> list[Any] | None:
    """Nested words for the cells: the field's own, or those of an id field over the same axes."""
    known = {n: a for n, a in result.axes().items() if n in result.labels and n in result.tensors() and n not in axes}
    for name in (field, *known):
        if name in known and known[name] == axes:
            return result.labels[name]
        if name in known and known[name][:-1] == axes and has_role(known[name][-1], "choice"):
            return _first(result.labels[name], len(axes))
    return None


def _first(nested: Any, depth: int) -> Any:
    return nested[0] if depth == 0 else [_first(part, depth - 1) for part in nested]


def _names(result: Result, axis: str, size: int) -> tuple[str, ...]:
    return tuple(visible(x) for x in result.labels.get(axis, range(size)))


def _panels(
    lead: tuple[str, ...], names: dict[str, tuple[str, ...]], ground: Tensor, most: int
) -> list[tuple[tuple[int, ...], str]]:
    """Return the indices and words of the panels that have a value (all if none has), in their order; of too many,
    those with the largest values.
    """
    found = list(itertools.product(*(range(len(names[a])) for a in lead)))
    cells = len(found), math.prod(ground.shape[len(lead) :])
    sizes = ground.abs().nan_to_num(-1.0, posinf=math.inf).reshape(cells)
    size = torch.nn.functional.pad(sizes, (1, 0), value=-1.0).amax(-1)  # a panel may have no cells
    shown = min(most, int(size.ge(0).sum()) or len(found))
    found = [found[i] for i in sorted(size.argsort(descending=True, stable=True)[:shown].tolist())]
    return [(at, _join(*(f"{spoken(a)} {names[a][i]}" for a, i in zip(lead, at, strict=True)))) for at in found]


def _counted(shown: list[Picture], hidden: int, most: int) -> list[Picture]:
    """Return panels that say how many others there are."""
    says = "more panels" if len(shown) == most else "panels without a value"
    return [replace(p, note=_join(p.note, f"{hidden} {says}")) if hidden > 0 else p for p in shown]


def _by_unit(result: Result, field: str) -> list[tuple[str, Result]]:
    """Return a result in parts whose entries share a unit, where the entries of the field have units of their own."""
    axes, units = result.axes()[field], result.units
    labels = result.labels.get(axes[0], []) if axes else []
    if not any(x in units for x in labels if isinstance(x, str)):
        return []
    groups: dict[str, list[Any]] = {}
    for label in labels:
        groups.setdefault(str(units.get(label, "")), []).append(label)
    return [
        (unit, replace(result.select(**{axes[0]: found}), units=result.units | {field: unit}))
        for unit, found in groups.items()
    ]


def _matrix(
    t: Tensor, axes: tuple[str, ...], lead: tuple[str, ...], index: tuple[int, ...], row: str, column: str
) -> Tensor:
    t = t[index] if lead else t
    if row and column:
        return t if axes.index(row) < axes.index(column) else t.T
    return t.reshape(-1, 1) if row else t.reshape(1, -1)


def _cell_words(
    words: list[Any], axes: tuple[str, ...], lead: tuple[str, ...], index: tuple[int, ...], row: str, column: str
):
    part: Any = words
    for i in index:
        part = part[i]
    if row and column:
        grid = part if axes.index(row) < axes.index(column) else list(zip(*part, strict=True))
    elif not axes:
        grid = [[part]]
    else:
        grid = [[w] for w in part] if row else [part]
    return tuple(tuple(visible(w) for w in line) for line in grid)


def _grids(part: dict[str, Tensor]) -> dict[str, Grid | None]:
    keys = ("values", "low", "high", "null_low", "null_high")
    return {n: tuple(map(tuple, part[n].tolist())) if n in part else None for n in keys}


def _fitted(part: dict[str, Tensor], given: dict[str, Any], bars: int, rows: int, columns: int) -> Picture:
    """Return a picture of no more entries than fit; heat maps are pooled as tensors, before they become numbers."""
    if given["kind"] == "heat" and (len(given["rows"]) > rows or len(given["columns"]) > columns):
        return _pooled(part, given, rows, columns)
    picture = Picture(**_grids(part), **given)
    return _sorted(picture, bars) if KINDS[picture.kind].ranked else picture


def _sorted(p: Picture, most: int) -> Picture:
    def size(i: int) -> float:
        return -1.0 if math.isnan(v := p.values[i][0]) else abs(v)

    order = sorted(range(len(p.rows)), key=lambda i: (-size(i), i))[:most]
    grids = {
        n: tuple(g[i] for i in order) if (g := getattr(p, n)) is not None else None
        for n in ("values", "low", "high", "null_low", "null_high", "words")
    }
    note = _join(p.note, f"{most} largest of {len(p.rows)}") if len(p.rows) > most else p.note
    drawn = p.layout.take(order) if p.layout is not None else None
    return replace(p, rows=tuple(p.rows[i] for i in order), note=note, layout=drawn, **grids)


def _pooled(part: dict[str, Tensor], given: dict[str, Any], rows: int, columns: int) -> Picture:
    """Return a picture whose cells each show the entry of largest magnitude of a group."""
    keys = list(part)
    stack = torch.stack([part[k] for k in keys])
    stack, every_row = _pool(stack, keys.index("values"), rows)
    stack, every_column = _pool(stack.transpose(1, 2), keys.index("values"), columns)
    grids = _grids(dict(zip(keys, stack.transpose(1, 2), strict=True)))
    names = {"rows": _ranges(given["rows"], every_row), "columns": _ranges(given["columns"], every_column)}
    note = _join(given["note"], f"each cell shows the largest value of {every_row} × {every_column} entries")
    return Picture(**grids, **{**given, **names, "words": None, "note": note})


def _pool(stack: Tensor, values: int, most: int) -> tuple[Tensor, int]:
    """Return the groups of entries along axis 1, each represented by its entry of largest magnitude."""
    every = math.ceil(stack.shape[1] / most)
    groups = math.ceil(stack.shape[1] / every)
    padded = torch.full((len(stack), groups * every, stack.shape[2]), math.nan)
    padded[:, : stack.shape[1]] = stack
    padded = padded.reshape(len(stack), groups, every, -1)
    chosen = padded[values].abs().nan_to_num(-1.0, posinf=math.inf).argmax(1)
    return padded.gather(2, chosen[None, :, None].expand(len(stack), -1, 1, -1)).squeeze(2), every


def _ranges(names: tuple[str, ...], every: int) -> tuple[str, ...]:
    if every == 1:
        return names
    parts = (names[i : i + every] for i in range(0, len(names), every))
    return tuple(part[0] if len(part) == 1 else f"{part[0]}…{part[-1]}" for part in parts)


def _join(*parts: str) -> str:
    return "; ".join(p for p in parts if p)
