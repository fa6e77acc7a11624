"""Kinds of pictures: one row per kind says which fields it suits and what draws it in each medium."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from cutaway.core.result import Result
from cutaway.views.axes import has_role
from cutaway.views.graph_layout import is_graph

Medium = Literal["terminal", "markup", "figure", "size"]
#: the axes that get a panel per entry, the axis of the rows and that of the columns; empty where there is none
Frame = tuple[tuple[str, ...], str, str]

_WIDE = 64  # more cells in a single row than this are shown as bars
_FEW = 6  # the eye does not separate more curves in one frame


@dataclass(frozen=True)
class Kind:
    """A kind of picture. Functions that draw are named `module:function` and loaded when first used.

    Attributes:
        frame: takes a result, a field and the size of each of its axes; returns how the axes are laid out, or None if
            the kind does not suit the field.
        terminal: takes a picture, a width in characters and a `Pen`; returns lines of rich text.
        markup: takes a picture; returns HTML or SVG.
        figure: takes a picture and matplotlib axes, on which it draws.
        size: takes a picture and the width of a panel; returns the size of its panel in inches.
        ranked: True if there is one column whose rows are sorted by size and cut after the largest.
    """

    frame: Callable[[Result, str, Mapping[str, int]], Frame | None]
    terminal: str
    markup: str
    figure: str
    size: str = "cutaway.views.draw.figure:usual_size"
    ranked: bool = False


def kind_of(result: Result, field: str, sizes: Mapping[str, int]) -> tuple[str, Frame]:
    """Return the first kind that suits a field with these axes, and its frame."""
    found = ((name, kind.frame(result, field, sizes)) for name, kind in KINDS.items())
    return next((name, frame) for name, frame in found if frame is not None)


def drawer(kind: str, medium: Medium) -> Callable[..., Any]:
    """Return the function that draws a kind of picture in a medium."""
    module, _, name = getattr(KINDS[kind], medium).partition(":")
    return getattr(import_module(module), name)


def _graph(result: Result, field: str, sizes: Mapping[str, int]) -> Frame | None:
    return ((), "edge", "") if is_graph(result, field) else None


def _number(result: Result, field: str, sizes: Mapping[str, int]) -> Frame | None:
    return None if sizes else ((), "", "")


def _bars(result: Result, field: str, sizes: Mapping[str, int]) -> Frame | None:
    *lead, last = sizes
    single = len(lead) == 1 and sizes[lead[0]] == 1 and sizes[last] > _WIDE  # the largest by name tell more than a row
    suits = (single and not has_role(last, "place")) or (not lead and not has_role(last, "place", "depth"))
    return (tuple(lead), last, "") if suits else None


def _strip(result: Result, field: str, sizes: Mapping[str, int]) -> Frame | None:
    *lead, last = sizes
    suits = not lead or (len(lead) == 1 and has_role(lead[0], "example"))
    return (tuple(lead), "", last) if suits and has_role(last, "place") else None


def _line(result: Result, field: str, sizes: Mapping[str, int]) -> Frame | None:
    *lead, last = sizes
    if not lead:
        return ((), "", last) if has_role(last, "depth") else None
    *lead, first = lead
    for curve, along in ((last, first), (first, last)):
        few = sizes[curve] <= _FEW and not has_role(curve, "place", "unit", "depth")
        if few and has_role(along, "depth"):
            return tuple(lead), curve, along
    return None


def _heat(result: Result, field: str, sizes: Mapping[str, int]) -> Frame | None:
    *lead, first, last = sizes
    return tuple(lead), first, last


def _kind(frame: Callable[..., Frame | None], name: str, size: str = "usual_size", ranked: bool = False) -> Kind:
    terminal, markup, figure, inches = (
        f"cutaway.views.draw.{at}"
        for at in (f"terminal:draw_{name}", f"markup:draw_{name}", f"figure:draw_{name}", f"figure:{size}")
    )
    return Kind(frame, terminal, markup, figure, inches, ranked)


#: every kind by its name; the first that suits a field is drawn
KINDS: dict[str, Kind] = {
    "number": _kind(_number, "number", "number_size"),
    "graph": Kind(
        _graph,
        "cutaway.views.draw.terminal:draw_bars",
        "cutaway.views.draw.graph_markup:draw_graph",
        "cutaway.views.draw.graph_figure:draw_graph",
        "cutaway.views.draw.graph_figure:graph_size",
        ranked=True,
    ),
    "bars": _kind(_bars, "bars", "bars_size", ranked=True),
    "strip": _kind(_strip, "strip", "strip_size"),
    "line": _kind(_line, "line"),
    "heat": _kind(_heat, "heat", "heat_size"),
}
