"""Results: frozen dataclasses of tensors whose jaxtyping strings are the axis schema.

    @dataclass(frozen=True, kw_only=True)
    class Curve(Result, kind="curve"):
        probability: Float[Tensor, "layer"]
        interval: Float[Tensor, "layer bound"]

The axis names check the shapes, name the columns of a frame, choose the picture and travel with the file. A class
whose instances differ in their axes writes `*cell` for them, and each instance names its own: `grid=("layer", "head")`.
Fields that are no tensors (a number, a text, a tuple of them) are facts: they travel in the header of the file.
"""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from cutaway.core.files import held, read_tensors, reading, write_tensors
from cutaway.core.old_kinds import OLD_KINDS, OldKind, fields_of_record
from cutaway.core.refuse import Refused, nearest
from cutaway.core.render import RENDERERS
from cutaway.core.stats import correlation

KINDS: dict[str, type[Result]] = {}
COMMON = ("grid", "labels", "units", "neutral", "reasons", "record")
NEUTRAL = {"AUROC": 0.5, "ratio": 1.0}  # by unit: the value that means no effect, where that is not 0
CELL = "*cell"  # in a field's annotation: the axes that the instance names


@dataclass(frozen=True, kw_only=True)
class Result:
    """Named tensors with labelled axes, units, and the record of how they came about.

    Attributes:
        page: the fields that are shown beside the first where there is room for few.
        grid: the axes that `*cell` stands for in the annotations of this class.
        labels: the names of an axis's entries, by axis; or by field a nested list of words for its values (token
            strings beside token ids).
        units: the unit of each field, and of each entry that has its own, by the entry's label.
        neutral: the value of a field that means no effect, such as an accuracy by chance, where its unit does not say
            it (½ of an AUROC, 1 of a ratio) and it is not 0.
        reasons: why a field, or one of its entries by its label, has no interval or no null.
        record: JSON-ready provenance, for readers: whatever code reads is a field.
    """

    kind: ClassVar[str] = ""
    page: ClassVar[tuple[str, ...]] = ()
    grid: tuple[str, ...] = ()
    labels: dict[str, list[Any]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    neutral: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def __init_subclass__(cls, kind: str = "", **kw: Any):
        super().__init_subclass__(**kw)
        if kind:
            if kind in KINDS and KINDS[kind].__qualname__ != cls.__qualname__:
                raise TypeError(f"two result classes of kind {kind!r}: {KINDS[kind].__qualname__}, {cls.__qualname__}")
            if hidden := [n for n in cls.__annotations__ if hasattr(Result, n) and n not in Result.__annotations__]:
                raise TypeError(f"{cls.__qualname__}: a field {hidden[0]!r} would hide the method of that name")
            cls.kind = kind
            KINDS[kind] = cls

    @classmethod
    def schema(cls) -> dict[str, tuple[str, ...]]:
        """Return the axis names of every tensor field as the class annotates them, with `*cell` for those of the
        instance.
        """
        if "_schema" not in cls.__dict__:
            cls._schema = {n: a for n, hint in get_type_hints(cls).items() if (a := _axes_of(hint)) is not None}  # type: ignore[attr-defined]
        return cls._schema  # type: ignore[attr-defined]

    def axes(self) -> dict[str, tuple[str, ...]]:
        """Return the axis names of every tensor field."""
        schema = self.schema()
        if not self.grid:
            return {n: tuple(a for a in axes if a != CELL) for n, axes in schema.items()}
        return {n: tuple(x for a in axes for x in (self.grid if a == CELL else (a,))) for n, axes in schema.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensor fields that are present."""
        return {n: t for n in self.schema() if (t := getattr(self, n)) is not None}

    def facts(self) -> dict[str, Any]:
        """The fields that are no tensors, without those that every result has and those that are None."""
        own = (f.name for f in fields(self) if f.name not in self.schema() and f.name not in COMMON)
        return {n: value for n in own if (value := getattr(self, n)) is not None}

    def sizes(self) -> dict[str, int]:
        """Return the length of every axis."""
        axes = self.axes()
        return {a: n for f, t in self.tensors().items() for a, n in zip(axes[f], t.shape, strict=True)}

    def __post_init__(self):
        own = {a for axes in self.schema().values() for a in axes}
        if self.grid and (CELL not in own or len(set(self.grid)) < len(self.grid)):
            raise ValueError(f"{type(self).__name__} with the grid {self.grid}: its own axes are {sorted(own)}")
        size, every = dict[str, tuple[int, str]](), self.axes()
        for name, t in self.tensors().items():
            axes = every[name]
            if t.ndim != len(axes):
                raise ValueError(f"{type(self).__name__}.{name} has axes {axes} but shape {tuple(t.shape)}")
            for a, n in zip(axes, t.shape, strict=True):
                if size.setdefault(a, (n, name))[0] != n:
                    raise ValueError(f"axis {a!r} is {size[a][0]} long in .{size[a][1]} and {n} long in .{name}")
        for a, names in self.labels.items():
            expected = size[a][0] if a in size else len(t) if (t := self.tensors().get(a)) is not None else None
            if expected is None:
                raise ValueError(
                    f"labels for {a!r}, which is no axis or field of {type(self).__name__}: {sorted(size)}"
                )
            if len(names) != expected:
                raise ValueError(f"{len(names)} labels for {a!r} of length {expected}")

    def no_effect(self, name: str) -> float:
        """Return the value of a field that means no effect."""
        return self.neutral.get(name, NEUTRAL.get(self.units.get(name, ""), 0.0))

    @property
    def main(self) -> str:
        """The first tensor field: what the result is about."""
        return next(iter(self.tensors()))

    def frame(self, name: str | None = None) -> Any:
        """Return one field as a long pandas DataFrame with a column per axis (pandas is an optional dependency).

        The field's column has its name, or `value` where an axis has that name.
        """
        name = self._field(name)
        try:
            import pandas as pd
        except ImportError as error:
            raise Refused("frame()", "pandas is not installed", "pip install pandas, or read .tensors()") from error
        axes, t = self.axes()[name], getattr(self, name).detach().cpu()
        if not axes:
            return pd.DataFrame({name: [t.item()]})
        index = pd.MultiIndex.from_product(
            [self.labels.get(a, range(n)) for a, n in zip(axes, t.shape, strict=True)], names=axes
        )
        values = (t.float() if t.is_floating_point() else t).reshape(-1).numpy()
        return pd.Series(values, index=index, name="value" if name in axes else name).reset_index()

    def top(self, n: int = 10, by: str | None = None, largest: bool | None = None) -> list[dict[str, Any]]:
        """Return the `n` entries of largest |value| (or largest, or smallest value), each with its labels.

        Every other field that has the same leading axes contributes its values for that entry, by its name, or as
        `value` where an axis has that name.
        """
        by = self._field(by)
        every, t = self.axes(), getattr(self, by).detach().float().cpu()
        axes = every[by]
        key = t.abs() if largest is None else t if largest else -t
        order = key.reshape(-1).nan_to_num(-torch.inf).topk(min(n, t.numel())).indices
        rows = []
        for flat in order.tolist():
            where = dict(zip(axes, (int(i) for i in torch.unravel_index(torch.tensor(flat), t.shape)), strict=True))
            row: dict[str, Any] = {a: self.labels[a][i] if a in self.labels else i for a, i in where.items()}
            for other, u in self.tensors().items():
                if every[other][: len(axes)] == axes:
                    row["value" if other in axes else other] = u[tuple(where.values())].detach().cpu().tolist()
            rows.append(row)
        return rows

    def select(self, **at: Any) -> Self:
        """Return the same result restricted along axes, by label or index; the axes stay, with the chosen entries only.

        Raises:
            Refused: no such axis, or no such entry.
        """
        size, chosen = self.sizes(), {}
        for axis, wanted in at.items():
            if axis not in size:
                raise Refused(f"select({axis}=…)", f"{self.kind} has no such axis", f"its axes are {', '.join(size)}")
            chosen[axis] = self._entries(axis, wanted)
        kept: dict[str, Any] = {}
        for name, t in self.tensors().items():
            for d, axis in enumerate(self.axes()[name]):
                if axis in chosen:
                    t = t.index_select(d, torch.tensor(chosen[axis], dtype=torch.long, device=t.device))
            kept[name] = t
        labels = {
            a: [names[i] for i in chosen[a]] if a in chosen else names for a, names in self.labels.items() if a in size
        }
        labels |= {n: v for n, v in self.labels.items() if n not in size and not set(self.axes()[n]) & set(chosen)}
        return replace(self, **kept, labels=labels)

    def to(self, *args: Any, **kw: Any) -> Self:
        """Return the same result on another device or in another dtype (integer fields keep theirs)."""
        moved = {n: t.to(*args, **kw) for n, t in self.tensors().items() if t.is_floating_point()}
        device = torch.empty(0).to(*args, **kw).device
        moved |= {n: t.to(device) for n, t in self.tensors().items() if not t.is_floating_point()}
        return replace(self, **moved)

    def compare(self, other: Result) -> dict[str, dict[str, Any]]:
        """Compare shared fields of equal shape: largest and mean absolute difference, and Pearson correlation.

        Values that one side does not have (NaN) do not count. Intervals and nulls are not compared; they, fields of
        other shape and fields of one side only stand under "left out", each with the reason.

        Raises:
            Refused: a result of another kind or grid, or one whose main field has another shape.
        """
        if type(self) is not type(other) or self.grid != other.grid:
            raise Refused(f"compare with {other._named()}", f"this is {self._named()}", "compare results of one kind")
        out: dict[str, dict[str, Any]] = {}
        mine, theirs, left_out = self.tensors(), other.tensors(), dict[str, Any]()
        for name in (*mine, *(n for n in theirs if n not in mine)):
            a, b = mine.get(name), theirs.get(name)
            if a is None or b is None:
                left_out[name] = f"only the {'first' if b is None else 'second'} has it"
            elif self.axes()[name][-1:] in (("bound",), ("sample",)):
                left_out[name] = "an interval or a null"
            elif a.shape != b.shape:
                left_out[name] = f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
            else:
                out[name] = _gap(a, b)
        if self.main not in out:
            raise Refused(f"compare field {self.main!r}", left_out[self.main], "select the same axes")
        return out | ({"left out": left_out} if left_out else {})

    def save(self, path: str | Path) -> Path:
        """Write the result as safetensors with a JSON header; `cutaway.open` reads it back."""
        header = {"kind": self.kind, "class": f"{type(self).__module__}:{type(self).__qualname__}"}
        header |= {"grid": list(self.grid)} if self.grid else {}
        header |= {"facts": facts} if (facts := self.facts()) else {}
        header |= {"labels": self.labels, "units": self.units, "reasons": self.reasons, "record": self.record}
        header |= {"neutral": self.neutral} if self.neutral else {}
        return write_tensors(path, self.tensors(), header)

    def plot(self, name: str | None = None, **options: Any) -> Any:
        """Return a matplotlib figure of one field, chosen by its axes."""
        return self._render("figure", self._field(name), **options)

    def _repr_html_(self) -> str:
        return self._render("notebook")

    def _render(self, how: str, *args: Any, **options: Any) -> Any:
        if how not in RENDERERS:
            raise Refused(f"{how} of a {self.kind} result", "no view is loaded", "import cutaway before drawing")
        return RENDERERS[how](self, *args, **options)

    def _field(self, name: str | None) -> str:
        if name is None:
            return self.main
        if name not in self.tensors():
            raise Refused(f"field {name!r}", f"{self.kind} does not have it", f"use one of {', '.join(self.tensors())}")
        return name

    def _entries(self, axis: str, wanted: Any) -> list[int]:
        items = list(wanted) if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]
        size = self.sizes()[axis]
        return [self._index(axis, size, item) for item in items]

    def _index(self, axis: str, size: int, item: Any) -> int:
        names = self.labels.get(axis)
        if names is not None and item in names:
            return names.index(item)
        if isinstance(item, int) and -size <= item < size:
            return item % size
        close = nearest(str(item), names or [])
        hint = f"its entries are {', '.join(map(str, names[:8]))} …" if names else f"use 0 to {size - 1}"
        raise Refused(f"{axis}={item!r}", f"there is no such entry{f'; near: {close}' if close else ''}", hint)

    def _named(self) -> str:
        return type(self).__name__ + (f" over {' and '.join(self.grid)}" if self.grid else "")


def open_result(path: str | Path) -> Result:
    """Return the result saved at `path`, as an object of its own class.

    Raises:
        Refused: not a result file, or one of an unknown kind or with other fields.
    """
    tensors, header = read_tensors(path)
    cls, old = _class_of(path, header)
    kind, tensors = cls.kind, {old.renamed.get(n, n): t for n, t in tensors.items()}
    known = {f.name for f in fields(cls)}
    if not set(tensors) <= known:
        raise Refused(
            f"file {str(path)!r}",
            f"fields {sorted(set(tensors) - known)} are not in {kind}",
            "use the version that wrote it",
        )
    absent = {n: None for n in cls.schema() if n not in tensors}
    with reading(path):
        meta = {n: held(header, n, dict, {}) for n in ("labels", "units", "neutral", "reasons", "record")}
        facts = held(header, "facts", dict, {})
        if "reasons" not in header:
            facts |= fields_of_record(meta, next(iter(cls.schema())), known)
        meta["labels"] = {str(old.axes.get(axis, axis)): names for axis, names in meta["labels"].items()}
        _check_words(meta["labels"], meta["units"] | meta["reasons"])
        _check_numbers(meta["neutral"])
        grid = held(header, "grid", list, list(old.grid))
        if not all(isinstance(axis, str) for axis in grid):
            raise ValueError(f"the grid is {grid!r:.60}, which is no list of axes")
        for before, now in old.renamed.items():
            meta["units"] |= {now: meta["units"].pop(before)} if before in meta["units"] else {}
        needed = [n for n in absent if type(None) not in get_args(get_type_hints(cls)[n])]
        given = {*COMMON, *cls.schema(), *facts}
        needed += [f.name for f in fields(cls) if f.name not in given and f.default is MISSING]
        if needed:
            raise ValueError(f"the field {needed[0]!r} of {kind} is missing")
        typed = _facts(cls, facts)
        try:
            return cls(**tensors, **absent, **typed, **meta, grid=tuple(grid))
        except ValueError as error:
            why = f"its fields do not have the shapes of {kind}: {error}"
            raise Refused(f"file {str(path)!r}", why, "use the version that wrote it") from error


def _class_of(path: str | Path, header: dict[str, Any]) -> tuple[type[Result], OldKind]:
    """Find the class that reads a file, by a kind that is loaded or old, else by the class that the header names."""
    kind, where = header.get("kind"), header.get("class")
    old = OLD_KINDS.get(kind, OldKind("")) if isinstance(kind, str) else OldKind("")
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind], old
    where = old.path or where
    if isinstance(where, str) and re.fullmatch(r"cutaway(\.[a-z]\w*)+:[A-Z]\w*", where):
        module, name = where.split(":")
        try:
            found = getattr(import_module(module), name, None)
        except ModuleNotFoundError:
            found = None
        if isinstance(found, type) and issubclass(found, Result) and (old.path or found.kind == kind):
            return found, old
    why = f"its kind is {kind!r:.80}, which this version does not have"
    raise Refused(f"file {str(path)!r}", why, "use the version that wrote it")


def _facts(cls: type[Result], found: dict[str, Any]) -> dict[str, Any]:
    """The facts of a file's header as the class annotates them: JSON has lists in place of tuples."""
    hints, out = get_type_hints(cls), dict[str, Any]()
    for name, value in found.items():
        if name not in hints or name in cls.schema() or name in COMMON:
            raise ValueError(f"{cls.kind} has no field {name!r}")
        options = get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
        fitting = next((v for o in options if (v := _as_type(o, value)) is not None), None)
        if fitting is None:
            raise ValueError(f"{name!r} is {value!r:.60}, which is no {hints[name]}")
        out[name] = fitting
    return out


def _as_type(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        parts = [_as_type(get_args(kind)[0], v) for v in value] if isinstance(value, list | tuple) else [None]
        return None if None in parts else tuple(parts)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) else None


def _check_words(labels: dict[str, Any], units: dict[str, Any]) -> None:
    for name, words in labels.items():
        if not isinstance(words, list) or not all(map(_is_label, words)):
            raise ValueError(f"the labels of {name!r} are {words!r:.60}, which is no list of words")
    for name, unit in units.items():
        if not isinstance(unit, str):
            raise ValueError(f"the unit or reason of {name!r} is {unit!r:.60}, which is no text")


def _check_numbers(neutral: dict[str, Any]) -> None:
    for name, value in neutral.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"no effect of {name!r} is {value!r:.60}, which is no number")


def _is_label(label: Any) -> bool:
    return all(map(_is_label, label)) if isinstance(label, list) else not isinstance(label, dict)


def _gap(a: Tensor, b: Tensor) -> dict[str, float]:
    x, y = (t.double().cpu().reshape(-1) for t in (a, b))
    both = ~(x.isnan() | y.isnan())
    x, y = x[both], y[both]
    if not len(x):
        return dict.fromkeys(("largest", "mean", "pearson"), float("nan"))
    gap = (x - y).abs()
    return {"largest": float(gap.max()), "mean": float(gap.mean()), "pearson": correlation(x, y)}


def _axes_of(hint: Any) -> tuple[str, ...] | None:
    if hasattr(hint, "dim_str"):
        return tuple(hint.dim_str.split())
    if get_origin(hint) in (Union, types.UnionType):
        return next((a for part in get_args(hint) if (a := _axes_of(part)) is not None), None)
    return None
