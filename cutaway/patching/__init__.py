"""Patching: what changes when an activation is exchanged for its value in another run."""

from cutaway.interventions.effects import (
    HeadEffects,
    HeadPositionEffects,
    NeuronEffects,
    NeuronPositionEffects,
    NodeEffects,
    PositionEffects,
)
from cutaway.patching.ablate import (
    HeadAblation,
    HeadPositionAblation,
    LayerAblation,
    NeuronAblation,
    PositionAblation,
    ablate,
)
from cutaway.patching.activation import activation
from cutaway.patching.attribution import attribution
from cutaway.patching.attribution_star import (
    HeadPositionScores,
    HeadScores,
    NeuronPositionScores,
    NeuronScores,
    NodeScores,
    PositionScores,
    attribution_star,
)
from cutaway.patching.causal_trace import Trace, causal_trace
from cutaway.patching.cross_model import CrossHeads, CrossPositions, cross_model
from cutaway.patching.group import GroupEffect, group
from cutaway.patching.interactions import Interactions, interactions
from cutaway.patching.knockout import Knockouts, knockout
from cutaway.patching.knockout_curve import KnockoutCurve, knockout_curve
from cutaway.patching.path import MlpPathEffects, PathEffects, path
from cutaway.patching.relevance import relevance
from cutaway.patching.self_repair import SelfRepair, self_repair

__all__ = [
    "CrossHeads",
    "CrossPositions",
    "GroupEffect",
    "HeadAblation",
    "HeadEffects",
    "HeadPositionAblation",
    "HeadPositionEffects",
    "HeadPositionScores",
    "HeadScores",
    "Interactions",
    "KnockoutCurve",
    "Knockouts",
    "LayerAblation",
    "MlpPathEffects",
    "NeuronAblation",
    "NeuronEffects",
    "NeuronPositionEffects",
    "NeuronPositionScores",
    "NeuronScores",
    "NodeEffects",
    "NodeScores",
    "PathEffects",
    "PositionAblation",
    "PositionEffects",
    "PositionScores",
    "SelfRepair",
    "Trace",
    "ablate",
    "activation",
    "attribution",
    "attribution_star",
    "causal_trace",
    "cross_model",
    "group",
    "interactions",
    "knockout",
    "knockout_curve",
    "path",
    "relevance",
    "self_repair",
]
