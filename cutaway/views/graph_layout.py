"""The layout of a graph's picture: rows of depth, columns of position, and the boxes of nodes in their cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cutaway.core.node import Direction, Error, Latent, Logit, Others, parse_node
from cutaway.core.result import Result
from cutaway.views.wording import visible

MOST_EDGES = 80  # the eye does not separate more lines
_LONGEST = 24  # characters of a title


@dataclass(frozen=True)
class Box:
    """The box of one node.

    Attributes:
        name: title of the node, or its name without its position.
        kind: kind of the node.
        depth: row of its cell.
        column: column of its cell.
        slot: horizontal place, in slots.
        weak: True if the node has a control and does not exceed it.
        group: name of the group that it is drawn in, "" for none.
        tip: name of the node, and its whole title.
    """

    name: str
    kind: str
    depth: int
    column: int
    slot: float = 0.0
    weak: bool = False
    group: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Layout:
    """The nodes of a graph and the ends of its drawn edges, the first row at the input.

    Attributes:
        boxes: The nodes.
        ends: The source and target of each drawn edge, as indices of boxes.
        depths: The words of each row.
        columns: The words of each column.
        starts: Where each column begins, in slots; one more at the end.
    """

    boxes: tuple[Box, ...]
    ends: tuple[tuple[int, int], ...]
    depths: tuple[str, ...]
    columns: tuple[str, ...]
    starts: tuple[float, ...] = field(default=())

    def frames(self) -> list[tuple[str, list[int]]]:
        """Return the groups with their boxes that stand side by side; a group has a frame in each of its cells."""
        cells: dict[tuple[str, int, int], list[int]] = {}
        for i, b in enumerate(self.boxes):
            if b.group:
                cells.setdefault((b.group, b.column, b.depth), []).append(i)
        return [(group, found) for (group, *_), found in cells.items()]

    def take(self, order: Sequence[int]) -> Layout:
        """Keep some edges, in this order, and the nodes that they touch."""
        ends = [self.ends[i] for i in order]
        touched = sorted({n for pair in ends for n in pair})
        at = {n: i for i, n in enumerate(touched)}
        boxes = [self.boxes[n] for n in touched]
        depths, columns = (sorted({getattr(b, a) for b in boxes}) for a in ("depth", "column"))
        moved = [replace(b, depth=depths.index(b.depth), column=columns.index(b.column)) for b in boxes]
        rows, words = tuple(self.depths[i] for i in depths), tuple(self.columns[i] for i in columns)
        return _placed(moved, tuple((at[s], at[t]) for s, t in ends), rows, words)


def is_graph(result: Result, name: str) -> bool:
    """True if a field holds one number for each edge of a result that says where its edges begin and end."""
    axes = result.axes()
    ends = all(axes.get(n) == ("edge",) for n in ("source", "target"))
    return ends and axes[name] == ("edge",) and all(axes.get(n) == ("node",) for n in ("depth", "column"))


def is_structure(result: Result, name: str) -> bool:
    """True if a field holds the structure of a graph, which its picture or the names of its edges show already."""
    if name in ("writer", "reader"):
        return result.axes()[name] == ("edge",)
    return name in ("source", "target", "depth", "column", "exceeds") and is_graph(result, "source")


def layout(result: Result) -> Layout:
    """Lay out all nodes and edges of a graph."""
    tensors, labels = result.tensors(), result.labels
    depth, column, source, target = (tensors[n].tolist() for n in ("depth", "column", "source", "target"))
    weak = [not x for x in tensors["exceeds"].tolist()] if "exceeds" in tensors else [False] * len(depth)
    groups = result.facts().get("groups") or [""] * len(depth)
    tips = [f"{name} {title}".rstrip() for name, title in zip(labels["node"], titles(result, whole=True), strict=True)]
    each = zip(labels["node"], titles(result), depth, column, weak, groups, tips, strict=True)
    boxes = [_box(*one) for one in each]
    words = [
        dict(zip(tensors[n].tolist(), labels.get(n, tensors[n].tolist()), strict=True)) for n in ("depth", "column")
    ]
    depths, columns = (
        tuple(str(known.get(i, i)).strip() for i in range(max(known, default=-1) + 1)) for known in words
    )
    return _placed(boxes, tuple(zip(source, target, strict=True)), depths, columns)


def titles(result: Result, whole: bool = False) -> list[str]:
    """Return the title of each node of a graph as it is drawn, or whole; "" for those without one."""
    given = result.facts().get("titles") or [""] * len(result.labels["node"])
    shown = [visible(t) if t else "" for t in given]
    return [t if whole or len(t) <= _LONGEST else f"{t[: _LONGEST - 1]}…" for t in shown]


def _box(name: str, title: str, depth: int, column: int, weak: bool, group: str, tip: str) -> Box:
    node = parse_node(name)
    kinds = {Latent: "latent", Error: "error", Others: "error", Logit: "logit", Direction: "logit"}
    shown = title or name.partition("@")[0]
    kind = kinds.get(type(node), "address")  # type: ignore[arg-type]
    return Box(shown, kind, depth, column, weak=weak, group=visible(group) if group else "", tip=tip)


def _placed(
    boxes: Sequence[Box], ends: tuple[tuple[int, int], ...], depths: tuple[str, ...], columns: tuple[str, ...]
) -> Layout:
    """Give each box of a cell its slot, the boxes of a cell in the middle of their column, groups together."""
    cells: dict[tuple[int, int], list[int]] = {}
    for i in sorted(range(len(boxes)), key=lambda i: boxes[i].group):
        cells.setdefault((boxes[i].column, boxes[i].depth), []).append(i)
    widths = [max([1, *(len(found) for (c, _), found in cells.items() if c == at)]) for at in range(len(columns))]
    starts = [float(sum(widths[:n])) for n in range(len(widths) + 1)]
    slots = {
        i: starts[c] + (widths[c] - len(found)) / 2 + n for (c, _), found in cells.items() for n, i in enumerate(found)
    }
    moved = (replace(b, slot=slots[i]) for i, b in enumerate(boxes))
    return Layout(tuple(moved), ends, depths, columns, tuple(starts))
