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
from cutaway.patching.attribution import attribution
from cutaway.patching.group import GroupEffect, group
from cutaway.patching.linear import NodeEffects
from cutaway.patching.relevance import relevance

__all__ = [
    "GroupEffect",
    "HeadAblation",
    "HeadEffects",
    "HeadPositionAblation",
    "LayerAblation",
    "NeuronAblation",
    "NodeEffects",
    "PositionAblation",
    "PositionEffects",
    "ablate",
    "activation",
    "attribution",
    "group",
    "relevance",
]
