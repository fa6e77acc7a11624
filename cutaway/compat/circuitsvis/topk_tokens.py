"""The tokens on which neurons are most and least active."""

from __future__ import annotations

from typing import Any

import torch

from cutaway.compat.circuitsvis.render import RenderedHTML, Shown, shown

_NEURONS = 16  # columns, those of the largest activation


def topk_tokens(
    tokens: list[list[str]],
    activations: list[Any],
    max_k: int = 10,
    first_dimension_name: str = "Layer",
    third_dimension_name: str = "Neuron",
    sample_labels: list[str] | None = None,
    first_dimension_labels: list[str] | None = None,
) -> RenderedHTML:
    """Draw the largest and smallest activations [layer, token, neuron] of each text by neuron, with their tokens."""
    drawn = list[Shown]()
    for text, value in enumerate(map(torch.as_tensor, activations)):
        for layer, part in enumerate(value.float()):
            chosen = part.abs().amax(0).topk(min(_NEURONS, part.shape[1])).indices
            most, least = (part[:, chosen].topk(min(max_k, len(part)), 0, largest) for largest in (True, False))
            found = torch.cat([most.indices, least.indices.flip(0)])
            words = [[tokens[text][i] for i in row] for row in found.tolist()]
            ranks = range(1, len(most.indices) + 1)
            order = [*(f"top {i}" for i in ranks), *(f"bottom {i}" for i in reversed(ranks))]
            names = (sample_labels or range(len(tokens)))[text], (first_dimension_labels or range(len(value)))[layer]
            title = f"text {names[0]}, {first_dimension_name.lower()} {names[1]}"
            axes = {"order": order, third_dimension_name.lower(): chosen.tolist()}
            drawn.append(shown(torch.cat([most.values, least.values.flip(0)]), axes, title, words))
    return RenderedHTML(*drawn)
