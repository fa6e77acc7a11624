"""Patching: what changes when an activation is exchanged for its value in another run."""

from cutaway.patching.ablate import (
    HeadAblation,
    HeadPositionAblation,
    LayerAblation,
    NeuronAblation,
    PositionAblation,
    ablate,
)
from cutaway.patching.activation import HeadEffects, PositionEffects, activation
from cutaway.patching.group import GroupEffect, group

__all__ = [
    "GroupEffect",
    "HeadAblation",
    "HeadEffects",
    "HeadPositionAblation",
    "LayerAblation",
    "NeuronAblation",
    "PositionAblation",
    "PositionEffects",
    "ablate",
    "activation",
    "group",
]
