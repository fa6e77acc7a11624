"""Graphs as matplotlib figures: boxes of nodes by depth and position, edges as curves from below to above."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cutaway.views.graph_layout import Layout
from cutaway.views.spec import Picture
from cutaway.views.wording import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:  # run-time type checks must not load matplotlib
    Axes = Any

_POSITIVE, _NEGATIVE, _WEAK, _INK, _SOFT, _RULE = "#2868ad", "#b85c0c", "#a7a59d", "#1c1e22", "#5c6169", "#dedcd5"
_GROUP = "#f7f1e1"
_FILL = {"address": "#ffffff", "latent": "#e3edf8", "error": "#f0efeb", "logit": "#e4f1ea"}


def graph_size(p: Picture, width: float) -> tuple[float, float]:
    """Return the size of a graph's panel in inches."""
    assert p.layout is not None
    longest = max((len(b.name) for b in p.layout.boxes), default=8)
    across = 1.4 + (0.35 + 0.075 * longest) * (p.layout.starts or (1.0,))[-1]
    return min(max(4.0, across), max(width, 16.0)), min(max(2.4, 1.0 + 0.75 * len(p.layout.depths)), 14.0)


def draw_graph(p: Picture, frame: Axes) -> None:
    """Draw the graph of a picture: line width says an edge's size, colour and dashes its sign."""
    found = p.layout
    assert found is not None
    frame.set_xlim(0.0, max(found.starts[-1], 1.0))
    frame.set_ylim(-0.5, max(len(found.depths), 1) - 0.5)
    for r in reversed(range(len(p.rows))):
        _edge(p, found, r, frame)
    for box in found.boxes:
        style: dict[str, Any] = {
            "boxstyle": "round,pad=0.3",
            "facecolor": _FILL[box.kind],
            "edgecolor": _WEAK if box.weak else _SOFT,
        }
        style |= {"linewidth": 0.8, "linestyle": "dashed" if box.kind == "error" else "solid"}
        frame.text(
            box.slot + 0.5,
            box.depth,
            box.name.replace("$", r"\$"),
            ha="center",
            va="center",
            fontsize=8,
            color=_SOFT if box.weak else _INK,
            bbox=style,
            zorder=3,
        )
    for name, members in found.frames():
        _group(found, name, members, frame)
    for x in found.starts[1:-1]:
        frame.axvline(x, color=_RULE, linewidth=0.8, zorder=0)
    frame.set_yticks(range(len(found.depths)), list(found.depths))
    middles = [(a + b) / 2 for a, b in zip(found.starts, found.starts[1:], strict=False)]
    frame.set_xticks(middles, [visible(c).replace("$", r"\$") for c in found.columns])
    frame.tick_params(length=0)
    said = ["dashed is negative", f"grey unless {p.mark}" if p.mark else ""]
    frame.set_xlabel("; ".join(x for x in said if x), fontsize=8)


def _group(found: Layout, name: str, members: list[int], frame: Axes) -> None:
    """Draw the frame behind boxes of a group, with its name."""
    from matplotlib.patches import FancyBboxPatch

    slots, depth = [found.boxes[n].slot for n in members], found.boxes[members[0]].depth
    low, width = min(slots) + 0.04, max(slots) - min(slots) + 0.92
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": _GROUP, "edgecolor": _SOFT, "linewidth": 0.6}
    frame.add_patch(FancyBboxPatch((low, depth - 0.24), width, 0.6, zorder=0.5, **style))
    frame.text(low + 0.05, depth + 0.24, name.replace("$", r"\$"), fontsize=6.5, color=_SOFT, zorder=3, clip_on=True)


def _edge(p: Picture, found: Layout, r: int, frame: Axes) -> None:
    from matplotlib.patches import FancyArrowPatch

    value = p.values[r][0]
    if not math.isfinite(value):
        return
    source, target = (found.boxes[n] for n in found.ends[r])
    colour = _WEAK if p.stands_out(r, 0) is False else _POSITIVE if value >= 0 else _NEGATIVE
    start, end = (source.slot + 0.5, source.depth + 0.2), (target.slot + 0.5, target.depth - 0.2)
    bend = 0.18 if source.slot == target.slot and target.depth - source.depth > 1 else 0.0  # around boxes between
    frame.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-",
            connectionstyle=f"arc3,rad={bend}",
            color=colour,
            zorder=1,
            linewidth=0.5 + 4.0 * abs(value) / (p.limit or 1.0),
            shrinkA=0,
            shrinkB=0,
            linestyle="solid" if value >= 0 else "dashed",
        )
    )
