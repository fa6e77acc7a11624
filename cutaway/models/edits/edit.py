"""The contract of an edit, and what all edits share: the places in a tensor that they change.

An edit names an address and says how the value there becomes another: `apply` gets the whole tensor of the site and the
frame of the forward, and returns the new tensor. An edit that treats each addressed value by itself leaves the places
to `at_places`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from cutaway.core.address import Address, unit_axis
from cutaway.core.refuse import Refused
from cutaway.models.access.positions import ForwardFrame, rows
from cutaway.models.anatomy.foreign_names import parsed
from cutaway.models.edits.batch_slice import BatchSlice

# What attention reads holds the cached columns too, as they were before any edit.
WITH_CACHE = ("k", "v")


class Edit(ABC):
    """A change of an activation at one address.

    Attributes:
        address: the place, as text or parsed.
        positions: several positions, in place of one in the address; None without.
        since: the first position that really changes; before it the run has the same values anyway.
        local: True if the change depends on nothing but the value at its own place.
        whole_batch: True if it may read across prompts, so that a plan must not divide them.
    """

    address: Address | str
    positions: tuple[int, ...] | None
    since: int = 0
    local: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = False

    @abstractmethod
    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        """Return the whole tensor of the site with this edit made: a new tensor, or `x` itself if nothing changes."""

    def select_prompts(self, prompts: BatchSlice) -> Edit:
        """Return the edit of some prompts of its batch; an edit that stores values per prompt slices them here."""
        return self

    def parts(self) -> tuple[Edit, ...]:
        """Return the edits of single places that this one stands for."""
        return (self,)

    @cached_property
    def where(self) -> Address:
        """The parsed address."""
        return parsed(self.address)

    @property
    def begins(self) -> Address:
        """The earliest place that the change depends on."""
        return self.where

    @property
    def placed(self) -> bool:
        """True if it names positions of the prompts, so that a forward must tell where they are."""
        return self.places() != [None]

    def axes(self) -> list[str]:
        """Return the axes of the values that are changed at once."""
        where, axes = self.where, self.where.row.axes.split()
        gone = [str(unit_axis(where.row))] if where.unit is not None else []
        return [a for a in axes if a not in gone and not (a == "position" and self.places() != [None])]

    def places(self) -> list[int | None]:
        """Return the positions that are edited; `[None]` means all at once."""
        if self.positions is not None and self.where.position is not None:
            raise Refused(f"edit at {self.where}", "it gives positions twice", "use @position or positions=, not both")
        return list(self.positions) if self.positions is not None else [self.where.position]


def at_places(edit: Edit, x: Tensor, frame: ForwardFrame, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the addressed values of a site's tensor, each place by itself.

    `change` maps the values, [batch, …] with the addressed position and unit axes selected away, to their replacement.
    """
    found = indices(edit, x, frame)
    if not found:
        return x
    if found == [()]:
        return _changed(edit, x, change)
    new = x.clone()
    for i in found:
        new[i] = _changed(edit, x[i], change)
    return new


def indices(edit: Edit, x: Tensor, frame: ForwardFrame) -> list[tuple[Any, ...]]:
    """Index each place that an edit changes and that is part of this forward; `()` is the whole tensor."""
    return [i for p in edit.places() if (i := index_of(edit, x, frame, p)) is not None]


def index_of(edit: Edit, x: Tensor, frame: ForwardFrame, position: int | None) -> tuple[Any, ...] | None:
    """Index the edit's unit at a position, or at all; None where the position is not part of this forward."""
    axes, where = edit.where.row.axes.split(), edit.where
    unit = axes.index(str(unit_axis(where.row))) if where.unit is not None else None
    if unit is not None and where.unit is not None and not where.unit < x.shape[unit]:
        raise Refused(f"edit at {where}", f"{axes[unit]} goes to {x.shape[unit] - 1} here", "choose a smaller index")
    if position is None and unit is None:
        return ()
    index: list[Any] = [slice(None)] * len(axes)
    if position is not None:
        column = _column(where, x, frame, position)
        if column is None:
            return None
        index[1] = column
        if isinstance(column, Tensor):
            seen = column >= 0
            index[:2] = rows(x.shape[0], x.device)[seen], column[seen]
    if unit is not None:
        index[unit] = where.unit
    return tuple(index)


def fitting(edit: Edit, value: Tensor, old: Tensor) -> Tensor:
    """Return `value` if it can stand where `old` stands: its last positions where a run begins at `since` or before.

    Raises:
        Refused: it does not broadcast to the shape of `old`.
    """
    if edit.since and "position" in (axes := edit.axes()):
        at = axes.index("position") - len(axes) + value.ndim
        more = value.shape[at] - old.shape[axes.index("position")] if at >= 0 else 0
        value = value.narrow(at, more, value.shape[at] - more) if more > 0 else value
    if not _fits(value, old):
        shapes = f"values of shape {tuple(value.shape)} do not fit {tuple(old.shape)}"
        raise Refused(f"edit at {edit.where}", shapes, f"the site's axes are {edit.where.row.axes}")
    return value.to(old.device)


def _fits(value: Tensor, old: Tensor) -> bool:
    """Return True if a value broadcasts to the shape of another."""
    if value.shape == old.shape[max(old.ndim - value.ndim, 0) :]:
        return True  # the common case, at every step of a generation: broadcast_shapes takes as long as a small layer
    try:
        return torch.broadcast_shapes(value.shape, old.shape) == old.shape
    except RuntimeError:
        return False


def _changed(edit: Edit, old: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change values into a tensor of their own: a model may go on to write into it."""
    new = fitting(edit, change(old), old).to(old.dtype)
    if edit.where.site == "scores":  # a row of padding sees nothing: scaled to −∞ its softmax would be NaN
        new = new.clamp_min(torch.finfo(old.dtype).min)
    return new if new.shape == old.shape else new.expand(old.shape).clone()


def _column(where: Address, x: Tensor, frame: ForwardFrame, position: int) -> int | Tensor | None:
    """Return the column of `x` at a prompt position, negative or None where that is past."""
    past = 0
    if where.site in WITH_CACHE:
        frame, past = frame.whole, frame.hidden(x.shape[1])
    column = frame.columns(position)
    if column is None and not frame.has(position):
        raise Refused(f"edit at {where}", f"position {position} is outside the prompt", "choose another position")
    if isinstance(column, Tensor):
        return column.to(x.device) - past  # negative where it is not there
    return column - past if column is not None and column >= past else None


@dataclass(frozen=True, eq=False)
class Wrapped(Edit):
    """Another edit at its own place, made only in part.

    Attributes:
        edit: the edit.
    """

    edit: Edit

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", self.edit.positions)
        object.__setattr__(self, "whole_batch", self.edit.whole_batch)

    @property
    def address(self) -> Address | str:  # type: ignore[override]
        return self.edit.address

    @cached_property
    def where(self) -> Address:
        return self.edit.where

    @property
    def begins(self) -> Address:
        return self.edit.begins

    @property
    def placed(self) -> bool:
        return self.edit.placed

    @property
    def since(self) -> int:  # type: ignore[override]
        return self.edit.since


@dataclass(frozen=True, eq=False)
class _OfPrompts(Wrapped):
    """An edit of some prompts of its batch; its values are sliced only when it is made."""

    prompts: BatchSlice

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        return self.edit.select_prompts(self.prompts).apply(x, frame)


def of_prompts(edits: Iterable[Edit], prompts: BatchSlice) -> list[Edit]:
    """Return the edits of some prompts of the batch that they were made for.

    Raises:
        Refused: an edit may read across prompts, and these are not all of them.
    """
    out: list[Edit] = []
    for e in edits:
        if e.whole_batch and not prompts.everything:
            why = "its prompts must run in parts here, and it may read all of them at once"
            raise Refused(f"{e!r}", why, "give it fewer prompts, or prompts of one length")
        sliced = type(e).select_prompts is not Edit.select_prompts and not prompts.everything
        out.append(_OfPrompts(e, prompts) if sliced else e)
    return out


def as_edits(edits: Edit | Sequence[Edit]) -> tuple[Edit, ...]:
    """Check one edit or several, and return the edits of single places that they stand for.

    Raises:
        Refused: something that is not an edit, or an edit of a site that cannot be written.
    """
    if edits == ():
        return ()
    items = (edits,) if isinstance(edits, Edit) else tuple(edits)
    for e in items:
        if not isinstance(e, Edit):
            raise Refused(
                f"edit {e!r}",
                "it is not an edit",
                "use Replace, Add, Scale, Ablate, Project, Cap, Freeze, Knockout, Conditional or Apply",
            )
    items = tuple(part for e in items for part in e.parts())
    for e in items:
        if not e.where.row.writable:
            raise Refused(f"edit at {e.where}", f"{e.where.site} can only be read", "edit the site it is computed from")
    return items


def expand_edits(
    base: Sequence[Edit], variants: Sequence[Sequence[Edit]]
) -> tuple[Sequence[Edit], Sequence[Sequence[Edit]]]:
    """Expand the edits of a sweep into edits of single places.

    An injected stream cannot hold a base whose edits depend on layers before their own; such a base becomes part of
    every variant.
    """
    base, variants = as_edits(base), [as_edits(v) for v in variants]
    if all(e.begins.layer == e.where.layer and (e.begins == e.where or e.begins.site != "resid_pre") for e in base):
        return base, variants
    return (), [(*base, *v) for v in variants]
