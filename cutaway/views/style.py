"""The style sheet of pictures, with both themes; importable without torch, for pages that draw nothing themselves."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from cutaway.views import palette

_ASSETS = Path(__file__).parent / "assets"
_FORCED = {
    "light": '.cw[data-theme="light"],[data-jp-theme-light="true"] .cw,.vscode-light .cw',
    "dark": '.cw[data-theme="dark"],[data-jp-theme-light="false"] .cw,.vscode-dark .cw,html[theme=dark] .cw',
}


@cache
def style() -> str:
    """Return the style sheet of pictures, with both themes."""
    sheet = asset("views.css").replace("/*LIGHT*/", palette.css("light")).replace("/*DARK*/", palette.css("dark"))
    light, dark = (sheet.split(f"/*{name}*/")[1] for name in ("light", "dark"))
    # The same two themes again, for the toggle of a page and for notebooks that say which theme they wear.
    forced = f"{_FORCED['light']}{{{light}}}{_FORCED['dark']}{{{dark}}}"
    forced += f"@media print{{.cw,.cw[data-theme]{{{light}}}}}"
    sheet = sheet.replace("/*FORCED*/", forced).replace("/*light*/", "").replace("/*dark*/", "")
    return (sheet + palette.rules()).strip()


def asset(name: str) -> str:
    """Return the text of one file that is inlined into pages."""
    return (_ASSETS / name).read_text(encoding="utf-8").strip()
