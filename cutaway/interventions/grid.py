"""Cells: the places of one site that are exchanged one by one, as a grid whose axes name it.

A stream site is cut by position [layer, position], and so are channels and states; a site with heads or neurons by
unit, all positions at once [layer, unit], or by both [layer, unit, position]; `by` chooses where there is a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cutaway.core.address import Address, Pattern, component_axis, unit_axis
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.sites import BY_NAME
from cutaway.core.sites import site as site_row
from cutaway.interventions.components import positions
from cutaway.interventions.spans import position_names
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.bound import Bound

By = Literal["auto", "position", "unit", "both"]


@dataclass(frozen=True)
class Cells:
    """The cells of one site: `unit` and `place` are the entries of their axes, None where that axis is not cut."""

    site: str
    layers: tuple[int, ...]
    unit: tuple[str, ...] | None
    place: tuple[str, ...] | None
    tokens: Tokens

    @property
    def unit_axis(self) -> str:
        """Name of the units' axis; key-value heads count as heads."""
        return str(unit_axis(site_row(self.site))).removeprefix("kv_")

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names of the grid."""
        return ("layer", *([self.unit_axis] if self.unit else []), *(["position"] if self.place else []))

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return (len(self.layers), *(len(names) for names in (self.unit, self.place) if names))

    def labels(self) -> dict[str, list[Any]]:
        """Return the entries of every axis."""
        second = {self.unit_axis: list(self.unit)} if self.unit else {}
        return {"layer": list(self.layers)} | second | ({"position": list(self.place)} if self.place else {})

    def addresses(self) -> list[Address]:
        """Return every cell, in the order of the grid."""
        units = range(len(self.unit)) if self.unit else [None]
        places = positions(self.tokens) if self.place else [None]
        return [Address(self.site, i, u, p) for i in self.layers for u in units for p in places]


def cells(model: Model, bound: Bound, pattern: Pattern, by: By = "auto") -> Cells | None:
    """Return the grid that `site` or `site.layer` means; None for a pattern that names units or positions itself.

    Raises:
        Refused: a site whose activations cannot be exchanged in this way, or one that this model does not have.
    """
    places = model.places(pattern)
    site = places[0].site
    row = BY_NAME[site]
    if row.scope != "layer" or row.axes == "batch position" or not row.writable:
        why = "it has no layers" if row.scope != "layer" else f"its axes are {row.axes}"
        raise Refused(f"exchanging site {site!r}", why, "use a stream site as resid_pre, or one with heads as z")
    if any(a.unit is not None or a.position is not None for a in places):
        return None
    axis = component_axis(row)
    by = ("unit" if axis else "position") if by == "auto" else by
    if by in ("unit", "both") and not axis:
        raise Refused(
            f"cells of {site!r} by {by}",
            f"its axes are {row.axes}, so it has no units to cut",
            ("use ", Keyword("by", "position")),
        )
    if by in ("position", "both") and not row.has_position:
        raise Refused(f"cells of {site!r} by {by}", f"its axes are {row.axes}", ("use ", Keyword("by", "unit")))
    layers = tuple(a.layer for a in places if a.layer is not None)
    unit = tuple(f"{'kv ' if axis == 'kv_head' else ''}{u}" for u in range(model.sizes()[str(axis)])) if axis else None
    place = tuple(position_names(bound)) if by != "unit" else None
    return Cells(site, layers, unit if by != "position" else None, place, bound.clean)


def named(addresses: Sequence[Address], bound: Bound) -> list[str]:
    """Return the addresses in words: the site, layer and unit, and what a position is called where there is one."""
    tokens_at = dict(zip(positions(bound.clean), position_names(bound), strict=True))
    if not bound.clean.uneven:
        tokens_at |= {p - len(tokens_at): name for p, name in tokens_at.items()}
    said = []
    for a in addresses:
        bare = str(Address(a.site, a.layer, a.unit))
        said.append(bare if a.position is None else f"{bare} {tokens_at.get(a.position, f'@{a.position}')}")
    return said


def window_of(layer: int, window: int, layers: Sequence[int]) -> list[int]:
    """Return the layers exchanged together around one: [l − w // 2, l − w // 2 + w), as far as there are any.

    Raises:
        Refused: a window without layers, or wider than the one that reaches all layers from each of them.
    """
    widest = 2 * (layers[-1] - layers[0]) + 1
    if not 1 <= window <= widest:
        why = "it holds no layer" if window < 1 else f"{widest} reach all {len(layers)} layers from each of them"
        raise Refused(f"a window of {window} layers", why, f"use 1 to {widest}")
    low = layer - window // 2
    return [i for i in layers if low <= i < low + window]
