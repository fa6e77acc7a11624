"""Attention patterns [head, query, key] as one heat map a head. Colours of the caller's own are not taken."""

from __future__ import annotations

from typing import Any

import torch

from cutaway.compat.circuitsvis.render import RenderedHTML, shown


def attention_heads(
    attention: Any,
    tokens: list[str],
    attention_head_names: list[str] | None = None,
    max_value: float | None = None,
    min_value: float | None = None,
    negative_color: str | None = None,
    positive_color: str | None = None,
    mask_upper_tri: bool | None = None,
) -> RenderedHTML:
    """Draw the patterns of heads."""
    values = torch.as_tensor(attention).detach().float().cpu()
    if mask_upper_tri is not False:
        values = values.masked_fill(torch.ones(values.shape[-2:]).triu(1).bool(), torch.nan)
    axes = {"head": attention_head_names, "q_pos": tokens, "k_pos": tokens}
    return RenderedHTML(shown(values, axes, "attention"), ends=(max_value, min_value))


def attention_patterns(tokens: list[str], attention: Any) -> RenderedHTML:
    """Draw the patterns of heads, the tokens first."""
    return attention_heads(attention, tokens)


def attention_pattern(tokens: list[str], attention: Any, **options: Any) -> RenderedHTML:
    """Draw the pattern [query, key] of one head; options are those of `attention_heads`, `show_axis_labels` ignored."""
    options.pop("show_axis_labels", None)
    return attention_heads(torch.as_tensor(attention)[None], tokens, **options)
