"""Render a result as an HTML fragment: its pictures, its numbers as a table, and how they were computed.

The fragment carries its own style sheet, runs no script and asks for nothing from outside.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from cutaway.core.result import Result
from cutaway.views.draw import markup
from cutaway.views.spec import pictures, valued
from cutaway.views.style import style
from cutaway.views.wording import spoken

# Said first and in words; whatever else a record holds follows under its own name.
_KNOWN = ("method", "answers", "paper", "control", "subjects", "options", "cost", "seed", "versions", "machine")
_CODE = ("command", "python")


def html(result: Result, field: str | None = None, **options: Any) -> str:
    """Return the result as a self-contained fragment.

    Args:
        result: what to draw.
        field: the one field to draw; all that have a value if None.
        options: what `spec.pictures` takes.
    """
    return f'<div class="cw cw-alone"><style>{style()}</style>{content(result, field, **options)}</div>'


def content(result: Result, field: str | None = None, **options: Any) -> str:
    """Return what `html` shows, without the style sheet."""
    names = [field] if field else valued(result)[0]
    body = "".join(drawn(result, name, **options) for name in names)
    tables = "".join(numbers(result, name, **options) for name in names)
    title = f"<p class=cw-kind>{escape(spoken(result.kind or type(result).__name__))}</p>"
    return title + body + fold("Numbers", tables) + computed([result])


def drawn(result: Result, field: str | None = None, **options: Any) -> str:
    """Return the pictures of one field, panels side by side where there is room."""
    found = pictures(result, field, **options)
    if len(found) == 1:
        return markup.draw(found[0])
    panels = "".join(markup.draw(p, key=False) for p in found)
    return f"<div class=cw-panels>{panels}</div>{max((markup.legend(p) for p in found), key=len)}"


def numbers(result: Result, field: str | None = None, **options: Any) -> str:
    """Return the numbers of one field as tables."""
    return "".join(markup.table(p) for p in pictures(result, field, **options))


def computed(results: Iterable[Result]) -> str:
    """Return the "how computed" disclosure of some results: records, facts and reasons; nothing if there are none."""
    known: list[Mapping[str, Any]] = []
    for r in results:
        record = r.record | r.facts() | ({"no interval or null": r.reasons} if r.reasons else {})
        if record and record not in known:
            known.append(record)
    return fold("How computed", "".join(_record(r) for r in known), "cw-how") if known else ""


def fold(summary: str, body: str, style_: str = "cw-numbers") -> str:
    """Return a closed disclosure; nothing if it would be empty."""
    return f"<details class={style_}><summary>{escape(summary)}</summary>{body}</details>" if body else ""


def _record(record: Mapping[str, Any]) -> str:
    order = [*(k for k in _KNOWN if k in record), *(k for k in record if k not in (*_KNOWN, *_CODE))]
    rows = "".join(
        f"<dt>{escape(spoken(k))}</dt><dd>{_said(k, record[k])}</dd>" for k in order if record[k] not in ({}, "", None)
    )
    code = "".join(_snippet(k, str(record[k])) for k in _CODE if record.get(k))
    return f"<dl class=cw-record>{rows}</dl>{code}"


def _said(key: str, value: Any) -> str:
    if key == "cost" and isinstance(value, Mapping):
        parts = [f"{value[k]:g} {k}" for k in ("forwards", "backwards") if value.get(k)]
        parts += [f"{value['seconds']:g} s"] if value.get("seconds") is not None else []
        declared = f" (declared: at most {value['declared']})" if value.get("declared") else ""
        return escape(", ".join(parts) + declared)
    if isinstance(value, Mapping):
        nested = any(isinstance(v, Mapping) for v in value.values())
        parts = (f"<span>{escape(spoken(str(k)))}</span> {_said('', v)}" for k, v in value.items())
        return ("<br>" if nested else ", ").join(parts)
    if isinstance(value, list | tuple):
        return "; ".join(_said("", v) for v in value)
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _snippet(language: str, code: str) -> str:
    return (
        f"<div class=cw-code><span>{escape(language)}</span><pre tabindex=0><code>{escape(code)}</code></pre>"
        f'<button type=button data-copy aria-label="Copy the {escape(language)} line" hidden>Copy</button></div>'
    )
