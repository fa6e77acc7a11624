"""Tokens with a value each, or several."""

from __future__ import annotations

from typing import Any

from cutaway.compat.circuitsvis.render import RenderedHTML, shown


def colored_tokens(
    tokens: list[str],
    values: Any,
    min_value: float | None = None,
    max_value: float | None = None,
    negative_color: str | None = None,
    positive_color: str | None = None,
) -> RenderedHTML:
    """Draw a strip of tokens, coloured by their values."""
    return RenderedHTML(shown(values, {"position": tokens}, "value"), ends=(max_value, min_value))


def colored_tokens_multi(tokens: list[str], values: Any, labels: list[str] | None = None) -> RenderedHTML:
    """Draw values [token, kind], a row a kind."""
    return RenderedHTML(shown(values, {"position": tokens, "row": labels}, "value"))
