"""Show results: pictures, numbers, record, data, and a page to keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cutaway.core.refuse import Refused
from cutaway.core.result import Result, open_result
from cutaway.studio.messages import Data, Drawing, Page, ResultOf, Shown, TwoResults
from cutaway.studio.session import Session
from cutaway.views.html import computed, drawn, numbers
from cutaway.views.page import Section
from cutaway.views.page import Show as Part
from cutaway.views.page import report as written
from cutaway.views.spec import checked, fields, valued, with_beside
from cutaway.views.summary import summary
from cutaway.views.wording import spoken

_MOST_DRAWN = 8  # fields that are drawn if none is named


def show(session: Session, request: ResultOf) -> Shown:
    """Show a result of the folder, with the fields that are named."""
    return shown(request.result, open_result(session.folder.result(request.result)), request.fields)


def difference(session: Session, request: TwoResults) -> Shown:
    """Show the first result minus the second, entry by entry; where entries are named otherwise, by the first.

    Raises:
        Refused: results of two kinds, or of other sizes.
    """
    a, b = (open_result(session.folder.result(n)) for n in (request.first, request.second))
    mine, theirs = a.tensors(), b.tensors()
    other = next((n for n in mine if n not in theirs or mine[n].shape != theirs[n].shape), None)
    if type(a) is not type(b) or a.grid != b.grid or other is not None:
        why = "they are of two kinds" if type(a) is not type(b) else f"their sizes differ in {other or 'the grid'}"
        raise Refused("the difference of two results", why, "give prompts of as many tokens, and the same options")
    beside = {n for n, axes in a.axes().items() if axes[-1:] in (("bound",), ("sample",))}
    change: dict[str, Any] = {
        n: torch.full_like(t, torch.nan) if n in beside else t - theirs[n]
        for n, t in mine.items()
        if t.is_floating_point()
    }
    ids = {n for n in a.labels if n in mine}
    record = {k: a.record[k] for k in ("method", "answers", "paper", "control", "rung") if k in a.record}
    found = replace(
        a,
        **change,
        labels={n: v for n, v in a.labels.items() if n not in ids},
        reasons=dict.fromkeys(fields(a), "a difference of two results has no interval of its own"),
        record=record | {"difference": {"first": a.record, "second": b.record}},
    )
    wanted = [f for f in request.fields if f in change and f not in beside] or [f for f in fields(a) if f in change]
    return shown(f"{request.first}-minus-{request.second}", found, wanted)


def data(session: Session, request: ResultOf) -> Data:
    """Return a result as data: all of its fields, or those named with their intervals and controls."""
    result = open_result(session.folder.result(request.result))
    kept = [n for f in request.fields for n in with_beside(result, checked(result, f))] or list(result.tensors())
    axes, tensors = result.axes(), result.tensors()
    return Data(
        kind=result.kind,
        fields={n: {"axes": list(axes[n]), "values": tensors[n].tolist()} for n in dict.fromkeys(kept)},
        labels=result.labels,
        units=result.units,
        facts=result.facts(),
        reasons=result.reasons,
        record=result.record,
    )


def report(session: Session, request: ResultOf) -> Page:
    """Return a result as one page of HTML that opens from disk."""
    result = open_result(session.folder.result(request.result))
    name = str(result.record.get("method", result.kind))
    shows = [Part(result, f) for f in _wanted(result, request.fields)]
    return Page(html=written(name, [Section("Result", str(result.record.get("answers", "")), shows=shows)]))


def shown(name: str, result: Result, wanted: list[str] | None = None) -> Shown:
    """Return a result as the page shows it."""
    record, axes = result.record, result.axes()
    drawings = [
        Drawing(
            field=f,
            title=spoken(f),
            axes=list(axes[f]),
            unit=result.units.get(f, ""),
            html=drawn(result, f),
            numbers=numbers(result, f),
        )
        for f in _wanted(result, wanted)
    ]
    seconds: Any = record.get("cost", {}).get("seconds")
    return Shown(
        id=name,
        kind=result.kind,
        method=str(record.get("method", "")),
        question=str(record.get("answers", "")),
        paper=str(record.get("paper", "")),
        control=str(record.get("control", "")),
        rung=str(record.get("rung", "")),
        summary=summary(result, fields(result)[0]),
        drawings=drawings,
        empty=[f for f in fields(result) if f not in {d.field for d in drawings}],
        how=computed([result]),
        python=str(record.get("python", "")),
        command=str(record.get("command", "")),
        seconds=seconds,
    )


def _wanted(result: Result, wanted: list[str] | None) -> list[str]:
    if wanted:
        return [checked(result, f) for f in wanted]
    tensors = result.tensors()
    return [f for f in valued(result)[0] if not tensors[f].is_complex()][:_MOST_DRAWN]
