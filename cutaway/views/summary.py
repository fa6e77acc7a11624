"""Summary of the fields that a picture leaves out, in a few lines of text, by their axes.

facts that are a word, or yes or no                                     → each by its name
a few named entries (statistic), and mappings of numbers in the record → each with its interval
no axis                                                                → the number
the drawn field's axes (and one more, named)                           → the values where the drawn one is largest
layer · step                                                           → the largest with its layer · both ends
prompt                                                                 → the mean
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cutaway.core.result import Result
from cutaway.views.axes import has_role
from cutaway.views.spec import interval_of
from cutaway.views.wording import amount, span, spoken, visible

_SPEAKING = ("component", "edge", "node")  # labels that need no axis beside them
_FEW = 6  # named entries that fit a line
# Mappings of numbers in a record that are about the run and not about what was found.
_RUN = ("cost", "versions", "machine", "options", "subjects", "model", "task")


def summary(result: Result, drawn: str, most: int = 3) -> list[str]:
    """Return at most `most` lines about what a picture of the field `drawn` leaves out, the most important first."""
    lines: list[str] = []
    for rule in (_facts, _named, _compared, _numbers, _where_largest, _deep, _over_prompts):
        lines += rule(result, drawn)
    return lines[:most]


def _facts(result: Result, drawn: str) -> Iterator[str]:
    words = {n: f for n, f in result.facts().items() if isinstance(f, str | bool) and f != ""}
    said = [f"{spoken(n)} {f if isinstance(f, str) else 'yes' if f else 'no'}" for n, f in words.items()]
    if said:
        yield ", ".join(said)


def _named(result: Result, drawn: str) -> Iterator[str]:
    for name, t in _others(result, drawn):
        axes = result.axes()[name]
        labels = result.labels.get(axes[0], []) if len(axes) == 1 else []
        if (
            0 < len(labels) <= _FEW
            and not has_role(axes[0], "depth", "example")
            and all(isinstance(x, str) for x in labels)
        ):
            said = (f"{label} {_value(result, name, (i,))}" for i, label in enumerate(labels))
            if not t.isnan().all():
                about = result.record.get(name)  # what it is measured on, where the record has words of that name
                where = f" ({about})" if isinstance(about, str) else ""
                yield f"{spoken(name)}: {', '.join(said)}{where}"


def _compared(result: Result, drawn: str) -> Iterator[str]:
    for key, found in result.record.items():
        if isinstance(found, Mapping) and found and key not in _RUN and all(map(_is_number, found.values())):
            yield f"{key}: {', '.join(f'{k} {amount(float(v))}' for k, v in found.items() if v is not None)}"


def _numbers(result: Result, drawn: str) -> Iterator[str]:
    found = [f"{spoken(n)} {_value(result, n, ())}" for n, t in _others(result, drawn) if not t.ndim and not t.isnan()]
    if found:
        yield ", ".join(found)


def _where_largest(result: Result, drawn: str) -> Iterator[str]:
    """Yield the fields on the drawn one's grid, at its largest entry."""
    t, axes = result.tensors()[drawn].detach().float().cpu(), result.axes()[drawn]
    if not axes or (len(axes) == 1 and has_role(axes[0], "depth")) or not bool(t.isfinite().any()):
        return
    at = _largest(t)
    said, apart = [], []
    for name, other in _others(result, drawn):
        here = result.axes()[name]
        if here == axes and not other.isnan().all() and not torch.equal(other.float().cpu(), t):
            own = at if not other[at].isnan() else _largest(other)  # not every field has a value everywhere
            where = "" if own == at else f" ({_place(result, axes, own)})"
            (apart if where else said).append(f"{spoken(name)} {_value(result, name, own)}{where}")
        elif here[1:] == axes and len(labels := result.labels.get(here[0], [])) <= _FEW:
            said += [f"{label} {_value(result, name, (i, *at))}" for i, label in enumerate(labels)]
    if said:
        yield f"at {_place(result, axes, at)}: {', '.join(said)}"
    if apart:
        yield f"largest {', '.join(apart)}"


def _largest(t: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(t.abs().nan_to_num(-1.0, posinf=-1.0).argmax(), t.shape))


def _deep(result: Result, drawn: str) -> Iterator[str]:
    """Yield the curves over depth: their ends if the drawn one is such a curve, else their largest value."""
    axes, said = result.axes()[drawn], []
    for name, t in _others(result, drawn):
        here = result.axes()[name]
        deep = here and has_role(here[-1], "depth") and len(here) < 3 and t.numel() and bool(t.isfinite().all())
        if not deep or (here == axes and len(here) == 2):  # the latter is said where the drawn one is largest
            continue
        if here == axes:
            said.append(f"{spoken(name)} {amount(float(t[0]))} → {_value(result, name, (len(t) - 1,))}")
        else:
            at = _largest(t)
            said.append(f"largest {spoken(name)} {_value(result, name, at)} ({_place(result, here, at)})")
    if said:
        yield ", ".join(said)


def _over_prompts(result: Result, drawn: str) -> Iterator[str]:
    found = [(n, t) for n, t in _others(result, drawn) if result.axes()[n] == ("prompt",)]
    said = [f"{spoken(n)} {amount(float(t.float().mean()), result.units.get(n, ''))}" for n, t in found]
    if said:
        n = len(found[0][1])
        yield f"mean of {n} prompts: {', '.join(said)}" if n > 1 else ", ".join(said)


def _others(result: Result, drawn: str) -> Iterator[tuple[str, Tensor]]:
    for name, t in result.tensors().items():
        if name != drawn and result.axes()[name][-1:] not in (("bound",), ("sample",)) and t.is_floating_point():
            yield name, t


def _value(result: Result, name: str, at: tuple[int, ...]) -> str:
    unit = _unit(result, name, at)
    text, bounds = amount(float(result.tensors()[name][at]), unit), interval_of(result, name)
    if bounds is None or bool(bounds[at].isnan().any()):
        return text
    low, high = bounds[at].tolist()
    return f"{text} {span(low, high, unit)}"


def _unit(result: Result, name: str, at: tuple[int, ...]) -> str:
    """Return the unit of an entry that has its own by its first label, else that of the field."""
    labels = result.labels.get(result.axes()[name][0], []) if at else []
    return result.units.get(str(labels[at[0]]) if labels else name, result.units.get(name, ""))


def _place(result: Result, axes: tuple[str, ...], at: tuple[int, ...]) -> str:
    names = (visible(result.labels.get(a, range(i + 1))[i]) for a, i in zip(axes, at, strict=True))
    return " · ".join(n if a in _SPEAKING else f"{spoken(a)} {n}" for a, n in zip(axes, names, strict=True))


def _is_number(x: Any) -> bool:
    return x is None or (isinstance(x, int | float) and not isinstance(x, bool))
