"""Outcomes: a method returns a result, something else that is saved with its record, or a tuple of these."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Union, get_args, get_origin, runtime_checkable


@runtime_checkable
class Outcome(Protocol):
    """The protocol of what methods return: a dataclass with a record, ready for JSON, that saves itself to a file.

    Results are outcomes, and so are rewrites of weights.
    """

    @property
    def record(self) -> Mapping[str, Any]: ...

    def save(self, path: str | Path) -> Path: ...


def kinds(hint: Any) -> tuple[type, ...]:
    """Return the classes of outcomes in the annotation of what a method returns.

    Raises:
        TypeError: one of them has no `record` or no method `save`.
    """
    if get_origin(hint) in (tuple, Union, types.UnionType):
        found = [kind for part in get_args(hint) if part is not ... for kind in kinds(part)]
        return tuple(dict.fromkeys(found))
    if not (is_dataclass(hint) and "record" in {f.name for f in fields(hint)} and hasattr(hint, "save")):
        raise TypeError(f"a method returns dataclasses with a record and a method save, or tuples of them: not {hint}")
    assert isinstance(hint, type)
    return (hint,)


def each(outcome: Any) -> tuple[Any, ...]:
    """Return the outcomes of a call, one or several."""
    return outcome if isinstance(outcome, tuple) else (outcome,)


def recorded(outcome: Any, complete: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Any:
    """Return what a call gave with the records that `complete` makes of its own; each of several says its part."""
    if not isinstance(outcome, tuple):
        return replace(outcome, record=complete(outcome.record))
    n = len(outcome)
    parts = [complete({"part": f"{i} of {n}", **part.record}) for i, part in enumerate(outcome, 1)]
    return tuple(replace(part, record=record) for part, record in zip(outcome, parts, strict=True))
