"""Edits: changes of activations as frozen data.

An edit names an address and says how the value there becomes another. `with model.edited(Ablate("z.9.6")): …` or
`model.run(prompt, edits=[…])`. Positions are positions in each prompt (negative from its last real token), whatever
the padding; an edit without position acts on all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address, unit_axis
from cutaway.core.refuse import Refused
from cutaway.models.access.positions import FRAME, Frame, rows
from cutaway.models.anatomy.foreign_names import parsed
from cutaway.models.anatomy.norms import wide
from cutaway.models.edits.batch_slice import Cut
from cutaway.models.tokens import Tokens

# What attention reads holds the cached columns too, as they were before any edit.
_WITH_CACHE = ("k", "v")
Baseline = Literal["zero", "mean", "resample", "optimal"]


class Edit(ABC):
    """One change at one address: `change` maps the addressed values to their replacement, of the same shape."""

    address: Address | str
    positions: tuple[int, ...] | None
    since: int = (
        0  # the first position, of those it acts on, that it changes: before it the run has these values anyway
    )
    local: ClassVar[bool] = True  # whether the change depends on nothing but the value at its own place
    whole_batch: ClassVar[bool] = False  # True if it may read across prompts, so that a plan must not divide them
    own_values: ClassVar[bool] = False  # whether it may hold values of single prompts, which `sliced` takes some of

    @abstractmethod
    def change(self, old: Tensor) -> Tensor:
        """The new values; `old` is [batch, …] with the addressed position and unit axes selected away."""

    @property
    def where(self) -> Address:
        """The parsed address."""
        return parsed(self.address)

    @property
    def begins(self) -> Address:
        """The earliest place that the change depends on."""
        return self.where

    @property
    def placed(self) -> bool:
        """Whether it names positions of the prompts, so that a forward must tell where they are."""
        return self.places() != [None]

    def parts(self) -> tuple[Edit, ...]:
        """The edits of single places that this one stands for."""
        return (self,)

    def of(self, cut: Cut) -> Edit:
        """The same edit of some prompts of the batch that it was made for."""
        return Sliced(self, cut) if self.own_values and not cut.everything else self

    def sliced(self, cut: Cut) -> Edit:
        """The edit with those prompts' values only; whoever has `own_values` makes it."""
        return self

    def axes(self) -> list[str]:
        """The axes of the values that are changed at once."""
        where, axes = self.where, self.where.row.axes.split()
        gone = [str(unit_axis(where.row))] if where.unit is not None else []
        return [a for a in axes if a not in gone and not (a == "position" and self.places() != [None])]

    def places(self) -> list[int | None]:
        """The positions that are edited; `[None]` means all at once."""
        if self.positions is not None and self.where.position is not None:
            raise Refused(f"edit at {self.where}", "it gives positions twice", "use @position or positions=, not both")
        return list(self.positions) if self.positions is not None else [self.where.position]

    def apply(self, x: Tensor) -> Tensor:
        """The whole site tensor with this edit made, as a new tensor."""
        index = [self._index(x, p) for p in self.places()]
        index = [i for i in index if i is not None]
        if not index:
            return x
        if index == [()]:
            return self._changed(x)
        new = x.clone()
        for i in index:
            new[i] = self._changed(x[i])
        return new

    def _changed(self, old: Tensor) -> Tensor:
        """What the old values become, as a tensor of its own: a model may go on to write into it."""
        new = self._fitting(self.change(old), old).to(old.dtype)
        if self.where.site == "scores":  # a row of padding sees nothing: scaled to −∞ its softmax would be NaN
            new = new.clamp_min(torch.finfo(old.dtype).min)
        return new if new.shape == old.shape else new.expand(old.shape).clone()

    def _fitting(self, value: Tensor, old: Tensor) -> Tensor:
        """`value`, if it can stand where `old` stands: its last positions where a run begins at `since` or before."""
        if self.since and "position" in (axes := self.axes()):
            at = axes.index("position") - len(axes) + value.ndim
            more = value.shape[at] - old.shape[axes.index("position")] if at >= 0 else 0
            value = value.narrow(at, more, value.shape[at] - more) if more > 0 else value
        try:
            fits = torch.broadcast_shapes(value.shape, old.shape) == old.shape
        except RuntimeError:
            fits = False
        if not fits:
            shapes = f"values of shape {tuple(value.shape)} do not fit {tuple(old.shape)}"
            raise Refused(f"edit at {self.where}", shapes, f"the site's axes are {self.where.row.axes}")
        return value.to(old.device)

    def _index(self, x: Tensor, position: int | None) -> tuple[Any, ...] | None:
        axes, where = self.where.row.axes.split(), self.where
        unit = axes.index(str(unit_axis(where.row))) if where.unit is not None else None
        if unit is not None and where.unit is not None and not where.unit < x.shape[unit]:
            raise Refused(
                f"edit at {where}", f"{axes[unit]} goes to {x.shape[unit] - 1} here", "choose a smaller index"
            )
        if position is None and unit is None:
            return ()
        index: list[Any] = [slice(None)] * len(axes)
        if position is not None:
            column = self._column(x, position)
            if column is None:
                return None
            index[1] = column
            if isinstance(column, Tensor):
                seen = column >= 0
                index[:2] = rows(x.shape[0], x.device)[seen], column[seen]
        if unit is not None:
            index[unit] = where.unit
        return tuple(index)

    def _column(self, x: Tensor, position: int) -> int | Tensor | None:
        """The column of `x` at a prompt position, negative or None where that is past."""
        frame = FRAME.get() or Frame(None, x.shape[0], x.shape[1])
        past = 0
        if self.where.site in _WITH_CACHE:
            frame, past = frame.whole, frame.hidden(x.shape[1])
        column = frame.columns(position)
        if column is None and not frame.has(position):
            raise Refused(
                f"edit at {self.where}", f"position {position} is outside the prompt", "choose another position"
            )
        if isinstance(column, Tensor):
            return column.to(x.device) - past  # negative where it is not there
        return column - past if column is not None and column >= past else None


@dataclass(frozen=True, eq=False)
class Sliced(Edit):
    """Another edit, of some prompts of its batch; their values are taken out only when it is made."""

    edit: Edit
    cut: Cut

    def __post_init__(self):
        object.__setattr__(self, "positions", self.edit.positions)

    @property
    def address(self) -> Address | str:  # type: ignore[override]
        return self.edit.address

    @property
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

    def apply(self, x: Tensor) -> Tensor:
        return self.edit.sliced(self.cut).apply(x)

    def change(self, old: Tensor) -> Tensor:
        return self.edit.sliced(self.cut).change(old)


@dataclass(frozen=True)
class Replace(Edit):
    """Put `value` there: broadcast over the batch, or one per prompt."""

    own_values: ClassVar[bool] = True
    address: Address | str
    value: Float[Tensor, "..."]
    positions: tuple[int, ...] | None = None
    since: int = 0

    def sliced(self, cut: Cut) -> Edit:
        return replace(self, value=cut.tensor(self.value, self.axes()))

    def change(self, old: Tensor) -> Tensor:
        return self._fitting(self.value, old).clone()


@dataclass(frozen=True)
class Add(Edit):
    """Add `coefficient · vector` (steering)."""

    own_values: ClassVar[bool] = True
    address: Address | str
    vector: Float[Tensor, "..."]
    coefficient: float = 1.0
    positions: tuple[int, ...] | None = None
    since: int = 0

    def sliced(self, cut: Cut) -> Edit:
        return replace(self, vector=cut.tensor(self.vector, self.axes()))

    def change(self, old: Tensor) -> Tensor:
        return old + self.coefficient * self._fitting(self.vector, old).to(old.dtype)


@dataclass(frozen=True)
class Scale(Edit):
    """Multiply by `factor`."""

    address: Address | str
    factor: float
    positions: tuple[int, ...] | None = None

    def change(self, old: Tensor) -> Tensor:
        return old * self.factor


@dataclass(frozen=True)
class Ablate(Edit):
    """Replace by a baseline: zero, or the given mean, resampled or optimal value (`value`)."""

    own_values: ClassVar[bool] = True
    address: Address | str
    how: Baseline = "zero"
    value: Float[Tensor, "..."] | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self):
        if (self.value is None) != (self.how == "zero"):
            raise Refused(
                f"{self.how} ablation at {self.address}",
                "the baseline's value is missing" if self.value is None else "zero ablation takes no value",
                "give value= for mean, resample and optimal; none for zero",
            )

    def sliced(self, cut: Cut) -> Edit:
        return self if self.value is None else replace(self, value=cut.tensor(self.value, self.axes()))

    def change(self, old: Tensor) -> Tensor:
        return torch.zeros_like(old) if self.value is None else self._fitting(self.value, old).clone()


@dataclass(frozen=True)
class Project(Edit):
    """Remove the span of `directions` (rows; they need not be orthonormal), or keep only that span."""

    address: Address | str
    directions: Float[Tensor, "rank width"]
    keep: bool = False
    positions: tuple[int, ...] | None = None

    def change(self, old: Tensor) -> Tensor:
        x = wide(old)
        span = torch.atleast_2d(self.directions)
        self._fitting(span[:1], old)
        basis = torch.linalg.qr(span.to(x.device, x.dtype).T).Q
        inside = x @ basis @ basis.T
        return inside if self.keep else x - inside


@dataclass(frozen=True)
class Freeze(Edit):
    """Hold the address at its value in another run: `source` is what `model.capture` returned.

    Prompts are aligned token by token, whatever the padding of the two runs. Tokens generated after the prompt go free.
    """

    own_values: ClassVar[bool] = True
    address: Address | str
    source: Mapping[str, Tensor] = field(repr=False)
    positions: tuple[int, ...] | None = None

    def __post_init__(self):
        if str(self.where.place) not in self.source:
            raise Refused(f"freeze {self.address}", f"the source has no {self.where.place}", "capture that site first")

    def sliced(self, cut: Cut) -> Edit:
        key = id(self.source), str(self.where.place)
        if key not in cut.held:
            cut.held[key] = self._source_of(cut)
        return replace(self, source=cut.held[key])

    @property
    def placed(self) -> bool:
        return True

    def _source_of(self, cut: Cut) -> Mapping[str, Tensor]:
        """The source of some prompts, cut by its own padding, which need not be that of the run."""
        place, there = self.where.place, getattr(self.source, "tokens", None)
        if isinstance(there, Tokens):
            if len(there) != cut.shape[0]:
                return self.source
            cut = Cut.of(there, cut.rows, cut.width < cut.shape[1])
        value = cut.tensor(self.source[str(place)], place.row.axes.split())
        if not isinstance(there, Tokens):
            return {str(place): value}
        return type(self.source)({place: value}, cut.tokens(there))  # type: ignore[call-arg]

    def apply(self, x: Tensor) -> Tensor:
        frame = FRAME.get()
        if frame is not None and frame.generating and self.where.site not in _WITH_CACHE:
            return x  # the prompt is in the key-value cache already
        held = self._held(x, frame)
        index = [i for i in (self._index(x, p) for p in self.places()) if i is not None]
        if index == [()]:
            return held
        new = x.clone()
        for i in index:
            new[i] = held[i]
        return new

    def change(self, old: Tensor) -> Tensor:
        return old  # apply() has the whole tensor, which freezing needs

    def _held(self, x: Tensor, frame: Frame | None) -> Tensor:
        """x with the other run's values wherever that run had a token."""
        value = self.source[str(self.where.place)].to(x.device, x.dtype)
        here, there = frame.tokens if frame is not None else None, getattr(self.source, "tokens", None)
        if not isinstance(here, Tokens) or not isinstance(there, Tokens):
            return self._expanded(value, x).clone()
        n, has_position, new = here.ids.shape[1], self.where.row.has_position, x.clone()
        if here.padded or there.padded:
            same = here.mask.shape == there.mask.shape and torch.equal(here.mask.cpu(), there.mask.cpu())
            if here.lengths.tolist() != there.lengths.tolist() or not (same or has_position):
                raise self._unlike(value, x)
            if has_position:
                moved = value.new_zeros(len(value), n, *value.shape[2:])
                moved[here.mask.to(x.device)] = value[there.mask.to(x.device)]
                value = moved
        past = 0 if frame is None else frame.hidden(x.shape[1]) if self.where.site in _WITH_CACHE else frame.offset
        part = new[:, : max(n - past, 0)] if has_position else new[:, :, :n, :n]  # what is generated goes free
        if has_position:  # a part of the prompt may be in the cache already, or come later
            if value.shape[1] != n:
                raise self._unlike(value, x)
            value = value[:, past : past + part.shape[1]]
        value = self._expanded(value, part)
        if here.padded and has_position:
            real = here.mask[:, past : past + part.shape[1]].to(x.device)
            value = torch.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), value, part)
        part.copy_(value)
        return new

    def _expanded(self, value: Tensor, x: Tensor) -> Tensor:
        if value.shape[1:] != x.shape[1:] or len(value) not in (1, len(x)):
            raise self._unlike(value, x)
        return value.expand(x.shape)

    def _unlike(self, value: Tensor, x: Tensor) -> Refused:
        shapes = f"it was captured as {tuple(value.shape)} and is {tuple(x.shape)} here, or padded otherwise"
        return Refused(f"freeze {self.address}", shapes, "capture it on prompts of the same lengths")


@dataclass(frozen=True)
class Knockout(Edit):
    """Cut attention edges: the scores from `queries` to `keys` become −∞ (Geva et al. 2023, arXiv:2304.14767).

    `address` names a pattern: `pattern.5` (all heads) or `pattern.5.3`. Positions may be negative. A query that would
    keep no key is refused: its attention would be undefined.
    """

    address: Address | str
    queries: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    positions: tuple[int, ...] | None = None

    @property
    def where(self) -> Address:
        return replace(parsed(self.address), site="scores")

    @property
    def placed(self) -> bool:
        return True

    def __post_init__(self):
        if parsed(self.address).site not in ("pattern", "scores"):
            raise Refused(
                f"knockout at {self.address}", "only attention edges can be cut", "write pattern.LAYER[.HEAD]"
            )
        if not self.queries or not self.keys:
            raise Refused(f"knockout at {self.address}", "it names no edge", "give queries= and keys=")

    def apply(self, x: Tensor) -> Tensor:
        frame = FRAME.get() or Frame(None, x.shape[0], x.shape[2])
        least = torch.finfo(x.dtype).min
        new, heads = x.clone(), slice(None) if self.where.unit is None else self.where.unit
        for query in self.queries:
            for b, row in enumerate(self._columns(frame, query, x)):
                for key in self.keys:
                    column = self._columns(frame.whole, key, x)[b]
                    # A sliding window keeps the latest keys only; what has left it is cut already.
                    if row is not None and column is not None and (here := column - frame.hidden(x.shape[3])) >= 0:
                        new[b, heads, row, here] = least
        if bool(((new.amax(-1) <= least / 2) & (x.amax(-1) > least / 2)).any()):
            raise Refused(
                f"knockout at {self.address}", "a query would keep no key at all", "leave it at least itself or BOS"
            )
        return new

    def change(self, old: Tensor) -> Tensor:
        return old  # apply() has the whole tensor, which cutting edges needs

    def _columns(self, frame: Frame, position: int, x: Tensor) -> list[int | None]:
        column = frame.columns(position)
        if column is None and not frame.has(position):
            why = f"position {position} is outside the prompt"
            raise Refused(f"knockout at {self.address}", why, "choose another position")
        if isinstance(column, Tensor):
            return [c if c >= 0 else None for c in column.tolist()]
        return [column] * len(x)


def as_edits(edits: Edit | Sequence[Edit]) -> tuple[Edit, ...]:
    """One edit or several, checked.

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
                "use Replace, Add, Scale, Ablate, Project, Freeze, Knockout or Apply",
            )
    items = tuple(part for e in items for part in e.parts())
    for e in items:
        if not e.where.row.writable:
            raise Refused(f"edit at {e.where}", f"{e.where.site} can only be read", "edit the site it is computed from")
    return items


def laid_out(
    base: Sequence[Edit], variants: Sequence[Sequence[Edit]]
) -> tuple[Sequence[Edit], Sequence[Sequence[Edit]]]:
    """The edits of a sweep as edits of single places.

    A base whose edits depend on earlier layers than their own cannot be held by an injected stream: it is made part of
    every variant.
    """
    base, variants = as_edits(base), [as_edits(v) for v in variants]
    if all(e.begins.layer == e.where.layer and (e.begins == e.where or e.begins.site != "resid_pre") for e in base):
        return base, variants
    return (), [(*base, *v) for v in variants]
