"""Drawing: figures, HTML and terminal pictures of Results, chosen by axis names and never by method.

`spec` derives a Picture from a field and its axes; `figure`, `terminal` and `html` draw Pictures in three media;
`page` binds several Results into one self-contained report.
"""

from __future__ import annotations

from typing import Any

from cutaway.core.result import RENDERERS, Result


def register() -> None:
    """Let results draw themselves; each medium is imported at its first picture."""
    RENDERERS["figure"] = _figure
    RENDERERS["html"] = _html


def _figure(result: Result, field: str | None = None, **options: Any) -> Any:
    from cutaway.views.figure import figure

    return figure(result, field, **options)


def _html(result: Result, **options: Any) -> str:
    from cutaway.views.html import html

    return html(result, **options)
