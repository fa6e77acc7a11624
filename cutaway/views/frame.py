"""Show a result in a notebook: a frame of its own, which no style of the notebook reaches and which reaches nothing.

The page inside has the style, pictures and keys of a report. Its sandbox lets it run its own script and nothing else:
it has no origin, its policy forbids every request, and all that it tells the notebook is how high it is.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

from cutaway.core.result import Result
from cutaway.views.html import content
from cutaway.views.page import POLICY
from cutaway.views.style import asset, style
from cutaway.views.wording import spoken

_HEIGHT = 480  # pixels, where no handler may run that fits it


def notebook(result: Result, field: str | None = None, **options: Any) -> str:
    """Return the result as a notebook shows it.

    Args:
        result: what to draw.
        field: the one field to draw; all that have a value if None.
        options: what `spec.pictures` takes.
    """
    return framed(content(result, field, **options), spoken(result.kind or type(result).__name__))


def framed(body: str, title: str) -> str:
    """Return pictures in a sandboxed frame that holds all they need; a notebook that is not trusted shows words."""
    script = asset("marks.js") + asset("frame.js")
    page = (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta http-equiv="Content-Security-Policy" '
        f'content="{POLICY}"><style>{style()}{asset("frame.css")}</style></head><body class=cw>{body}'
        f"<div id=tip role=status hidden></div><script>{script}</script></body></html>"
    )
    host = re.sub(r"/\*.*?\*/|\n\s*", "", asset("host.js"))
    inside = page.replace("&", "&amp;").replace("'", "&#39;")
    return (
        f'<div><iframe sandbox=allow-scripts title="{escape(title)}" onload="{escape(host)}" '
        f'style="display:block;width:100%;height:{_HEIGHT}px;border:0;'
        f"transition:color 1ms\" srcdoc='{inside}'>{escape(title)}: run the cell, or trust the notebook, to see its "
        "pictures</iframe></div>"
    )
