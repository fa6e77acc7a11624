"""Edits: changes of activations as frozen data.

An edit names an address and says how the value there becomes another. `with model.edited(Ablate("z.9.6")): …` or
`model.run(prompt, edits=[…])`. Positions are positions in each prompt (negative from its last real token), whatever
the padding; an edit without position acts on all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address, parse, unit_axis
from cutaway.core.refuse import Refused
from cutaway.models.frame import FRAME, Frame, rows

Baseline = Literal["zero", "mean", "resample", "optimal"]


class Edit(ABC):
    """One change at one address: `change` maps the addressed values to their replacement, of the same shape."""

    address: Address | str
    positions: tuple[int, ...] | None

    @abstractmethod
    def change(self, old: Tensor) -> Tensor:
        """The new values; `old` is [batch, …] with the addressed position and unit axes selected away."""

    @property
    def where(self) -> Address:
        """The parsed address."""
        return parse(self.address)

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
            return self._checked(x, self.change(x))
        new = x.clone()
        for i in index:
            new[i] = self._checked(x[i], self.change(x[i]))
        return new

    def _checked(self, old: Tensor, new: Tensor) -> Tensor:
        try:
            return new.to(old.dtype).expand(old.shape)
        except RuntimeError as error:
            shapes = f"values of shape {tuple(new.shape)} do not fit {tuple(old.shape)}"
            raise Refused(f"edit at {self.where}", shapes, f"the site's axes are {self.where.row.axes}") from error

    def _index(self, x: Tensor, position: int | None) -> tuple[Any, ...] | None:
        axes, where = self.where.row.axes.split(), self.where
        unit = axes.index(str(unit_axis(where.row))) if where.unit is not None else None
        if unit is not None and where.unit is not None and not where.unit < x.shape[unit]:
            raise Refused(
                f"edit at {where}", f"{axes[unit]} goes to {x.shape[unit] - 1} here", "choose a smaller index"
            )
        column: Any = slice(None)
        batch: Any = slice(None)
        if position is not None:
            frame = FRAME.get() or Frame(None, x.shape[0], x.shape[1])
            column = frame.columns(position)
            if column is None and (frame.offset == 0 or frame.tokens is None):
                raise Refused(
                    f"edit at {where}", f"position {position} is outside the prompt", "choose another position"
                )
            if column is None:
                return None  # already in the key-value cache while generating
            if isinstance(column, Tensor):
                batch, column = rows(x.shape[0], x.device), column.to(x.device)
        if position is None and unit is None:
            return ()
        index: list[Any] = [batch, column] + [slice(None)] * (len(axes) - 2)
        if unit is not None:
            index[unit] = where.unit
        return tuple(index)


@dataclass(frozen=True)
class Replace(Edit):
    """Put `value` there: broadcast over the batch, or one per prompt."""

    address: Address | str
    value: Float[Tensor, "..."]
    positions: tuple[int, ...] | None = None

    def change(self, old: Tensor) -> Tensor:
        return self.value.to(old.device)


@dataclass(frozen=True)
class Add(Edit):
    """Add `coefficient · vector` (steering)."""

    address: Address | str
    vector: Float[Tensor, "..."]
    coefficient: float = 1.0
    positions: tuple[int, ...] | None = None

    def change(self, old: Tensor) -> Tensor:
        return old + self.coefficient * self.vector.to(old.device, old.dtype)


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

    def change(self, old: Tensor) -> Tensor:
        return torch.zeros_like(old) if self.value is None else self.value.to(old.device)


@dataclass(frozen=True)
class Project(Edit):
    """Remove the span of `directions` (rows; they need not be orthonormal), or keep only that span."""

    address: Address | str
    directions: Float[Tensor, "rank width"]
    keep: bool = False
    positions: tuple[int, ...] | None = None

    def change(self, old: Tensor) -> Tensor:
        basis = torch.linalg.qr(torch.atleast_2d(self.directions).float().T).Q.to(old.device)
        inside = old.float() @ basis @ basis.T
        return inside if self.keep else old.float() - inside


@dataclass(frozen=True)
class Freeze(Edit):
    """Hold the address at its value in another run: `source` is what `model.capture` returned."""

    address: Address | str
    source: Mapping[str, Tensor] = field(repr=False)
    positions: tuple[int, ...] | None = None

    def __post_init__(self):
        if str(self.where.place) not in self.source:
            raise Refused(f"freeze {self.address}", f"the source has no {self.where.place}", "capture that site first")

    def apply(self, x: Tensor) -> Tensor:
        held = self.source[str(self.where.place)].to(x.device, x.dtype)
        if held.shape[1:] != x.shape[1:]:
            shapes = f"it was captured as {tuple(held.shape)} and is {tuple(x.shape)} here"
            raise Refused(f"freeze {self.address}", shapes, "capture it on a prompt of the same length")
        new, held = x.clone(), held.expand(x.shape)
        for index in (self._index(x, p) for p in self.places()):
            if index is not None:
                new[index] = held[index]
        return new

    def change(self, old: Tensor) -> Tensor:
        return old  # apply() has the whole tensor, which freezing needs


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
        return replace(parse(self.address), site="scores")

    def __post_init__(self):
        if parse(self.address).site not in ("pattern", "scores"):
            raise Refused(
                f"knockout at {self.address}", "only attention edges can be cut", "write pattern.LAYER[.HEAD]"
            )

    def apply(self, x: Tensor) -> Tensor:
        new, frame = x.clone(), FRAME.get() or Frame(None, x.shape[0], x.shape[2])
        for q in self.queries:
            column = frame.columns(q)
            if column is None:
                continue
            for b in range(x.shape[0]):
                row = int(column[b]) if isinstance(column, Tensor) else column
                keys = [self._key(frame, k, b, x.shape[3]) for k in self.keys]
                heads = slice(None) if self.where.unit is None else self.where.unit
                new[b, heads, row, keys] = torch.finfo(x.dtype).min
        if bool(
            (new.amax(-1) <= torch.finfo(x.dtype).min / 2).logical_and(x.amax(-1) > torch.finfo(x.dtype).min / 2).any()
        ):
            raise Refused(
                f"knockout at {self.address}", "a query would keep no key at all", "leave it at least itself or BOS"
            )
        return new

    def change(self, old: Tensor) -> Tensor:
        return old  # apply() has the whole tensor, which cutting edges needs

    def _key(self, frame: Frame, position: int, row: int, width: int) -> int:
        whole = replace_frame(frame, width)
        column = whole.columns(position)
        if column is None:
            raise Refused(f"knockout at {self.address}", f"key {position} is outside the prompt", "choose another key")
        return int(column[row]) if isinstance(column, Tensor) else column


def replace_frame(frame: Frame, width: int) -> Frame:
    """The frame of the keys: the cache included."""
    return Frame(frame.tokens, frame.batch, width, 0)


def as_edits(edits: Edit | Sequence[Edit]) -> tuple[Edit, ...]:
    """One edit or several, checked.

    Raises:
        Refused: something that is not an edit, or an edit of a site that cannot be written.
    """
    items = (edits,) if isinstance(edits, Edit) else tuple(edits)
    for e in items:
        if not isinstance(e, Edit):
            raise Refused(
                f"edit {e!r}", "it is not an edit", "use Replace, Add, Scale, Ablate, Project, Freeze or Knockout"
            )
        if not e.where.row.writable:
            raise Refused(f"edit at {e.where}", f"{e.where.site} can only be read", "edit the site it is computed from")
    return items
