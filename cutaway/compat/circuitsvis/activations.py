"""Activations of neurons on the tokens of texts."""

from __future__ import annotations

from typing import Any

import torch

from cutaway.compat.circuitsvis.render import RenderedHTML, shown


def text_neuron_activations(
    tokens: Any,
    activations: Any,
    first_dimension_name: str | None = "Layer",
    second_dimension_name: str | None = "Neuron",
    first_dimension_labels: list[str] | None = None,
    second_dimension_labels: list[str] | None = None,
) -> RenderedHTML:
    """Draw activations [token, layer, neuron] of a text or of several; an axis of one entry is left out."""
    texts, values = ([tokens], [activations]) if isinstance(tokens[0], str) else (tokens, activations)
    first, second = (str(name or "").lower() or "row" for name in (first_dimension_name, second_dimension_name))
    axes, drawn = {first: first_dimension_labels, second: second_dimension_labels}, []
    for text, value in zip(texts, map(torch.as_tensor, values), strict=True):
        kept = {a: names for (a, names), n in zip(axes.items(), value.shape[1:], strict=True) if n > 1}
        sizes = [n for n in value.shape[1:] if n > 1]
        drawn.append(shown(value.permute(1, 2, 0).reshape(*sizes, -1), {**kept, "position": text}, "activation"))
    return RenderedHTML(*drawn)
