"""Graphs as inline SVG: boxes of nodes by depth and position, edges as curves from below to above."""

from __future__ import annotations

import math
from html import escape

from cutaway.views.graph_layout import Layout
from cutaway.views.spec import Picture
from cutaway.views.wording import visible

_ROW, _BOX, _CHARACTER, _TOP, _SIDE, _GAP = 66, 22, 6.6, 14, 110, 14


def draw_graph(p: Picture) -> str:
    """Draw the graph of a picture: width and stroke say an edge's size and sign, its title the numbers."""
    found = p.layout
    if found is None or not found.boxes:
        return "<p>no edges</p>"
    slot = max(len(b.name) for b in found.boxes) * _CHARACTER + 10 + _GAP
    width, height = _SIDE + slot * found.starts[-1], _TOP + _ROW * len(found.depths) + 20
    lines = "".join(_edge(p, r, slot) for r in reversed(range(len(p.rows))))
    groups = "".join(_group(found, name, members, slot) for name, members in found.frames())
    boxes = "".join(_node(found, n, slot) for n in range(len(found.boxes)))
    label = escape(f"graph of {len(p.rows)} edges between {len(found.boxes)} nodes", quote=True)
    return (
        f'<div class=cw-scroll tabindex=0 role=region aria-label="{label}">'
        f'<svg class=cw-nodes width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role=group aria-label="{label}">{_frame(found, slot)}{groups}{lines}{boxes}</svg></div>'
    )


def centre(found: Layout, n: int, slot: float) -> tuple[float, float]:
    """Return the middle of a node's box."""
    box = found.boxes[n]
    return _SIDE + slot * (box.slot + 0.5), _TOP + _ROW * (len(found.depths) - 1 - box.depth) + _BOX / 2


def _frame(found: Layout, slot: float) -> str:
    """Return the words of rows and columns, and a rule at the edge of each column."""
    bottom = _TOP + _ROW * (len(found.depths) - 1) + _BOX + 12
    out = []
    for d, word in enumerate(found.depths):
        y = _TOP + _ROW * (len(found.depths) - 1 - d) + _BOX / 2
        out.append(f'<text class=cw-soft x=0 y="{y + 4:.1f}">{escape(word)}</text>')
    for c, word in enumerate(found.columns):
        low, high = (_SIDE + slot * found.starts[n] for n in (c, c + 1))
        out.append(f'<line class=cw-rule x1="{low:.1f}" x2="{low:.1f}" y1=2 y2="{bottom + 16:.1f}" />')
        out.append(f'<text class=cw-soft text-anchor=middle x="{(low + high) / 2:.1f}" y="{bottom + 12:.1f}">')
        out.append(f"{escape(visible(word))}</text>")
    return "".join(out)


def _group(found: Layout, name: str, members: list[int], slot: float) -> str:
    """Return the frame behind boxes of a group, with as much of its name as fits."""
    ends = [centre(found, n, slot)[0] for n in members]
    x, width, y = min(ends) - slot / 2 + 2, max(ends) - min(ends) + slot - 4, centre(found, members[0], slot)[1]
    most = max(int(width / _CHARACTER) - 1, 2)
    shown = name if len(name) <= most else f"{name[: most - 1]}…"
    return (
        f'<g class=cw-group><title>{escape(name)}</title><rect x="{x:.1f}" y="{y - _BOX / 2 - 17:.1f}" '
        f'width="{width:.1f}" height={_BOX + 22} rx=6 /><text x="{x + 5:.1f}" y="{y - _BOX / 2 - 5:.1f}">'
        f"{escape(shown)}</text></g>"
    )


def _edge(p: Picture, r: int, slot: float) -> str:
    assert p.layout is not None
    value = p.values[r][0]
    if not math.isfinite(value):
        return ""
    (x, y), (u, v) = (centre(p.layout, n, slot) for n in p.layout.ends[r])
    y, v = (y - _BOX / 2, v + _BOX / 2) if v < y else (y, v)
    bend = max(abs(y - v) / 2, 18)
    source, target = (p.layout.boxes[n] for n in p.layout.ends[r])
    # Around the boxes that stand between.
    aside = 0.42 * slot if source.slot == target.slot and target.depth - source.depth > 1 else 0.0
    size = 0.6 + 4.4 * abs(value) / (p.limit or 1.0)
    weak = " weak" if p.stands_out(r, 0) is False else ""
    sign = "cw-plus" if value >= 0 else "cw-minus"
    tip = escape("\n".join([p.place(r, 0), *p.facts(r, 0)]), quote=True)
    return (
        f'<path class="cw-edge {sign}{weak}" stroke-width="{size:.2f}" tabindex=0 '
        f'd="M{x:.1f} {y:.1f}C{x + aside:.1f} {y - bend:.1f} {u + aside:.1f} {v + bend:.1f} {u:.1f} {v:.1f}">'
        f"<title>{tip}</title></path>"
    )


def _node(found: Layout, n: int, slot: float) -> str:
    box, (x, y) = found.boxes[n], centre(found, n, slot)
    width, kind = len(box.name) * _CHARACTER + 10, box.kind + " weak" * box.weak
    return (
        f'<g class="cw-node {kind}"><title>{escape(box.tip)}</title>'
        f'<rect x="{x - width / 2:.1f}" y="{y - _BOX / 2:.1f}" width="{width:.1f}" height={_BOX} rx=4 />'
        f'<text text-anchor=middle x="{x:.1f}" y="{y + 4:.1f}">{escape(box.name)}</text></g>'
    )
