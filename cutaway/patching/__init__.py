"""Patching: what changes when an activation is exchanged for its value in another run."""

from cutaway.interventions.effects import Effects
from cutaway.patching.ablate import ablate
from cutaway.patching.activation import activation
from cutaway.patching.attribution import attribution
from cutaway.patching.attribution_star import attribution_star
from cutaway.patching.causal_trace import Trace, causal_trace
from cutaway.patching.cross_model import cross_model
from cutaway.patching.group import GroupEffect, group
from cutaway.patching.interactions import Interactions, interactions
from cutaway.patching.intervene import Intervention, intervene
from cutaway.patching.knockout import Knockouts, knockout
from cutaway.patching.knockout_curve import KnockoutCurve, knockout_curve
from cutaway.patching.path import path
from cutaway.patching.relevance import relevance
from cutaway.patching.self_repair import SelfRepair, self_repair

__all__ = [
    "Effects",
    "GroupEffect",
    "Interactions",
    "Intervention",
    "KnockoutCurve",
    "Knockouts",
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
    "intervene",
    "knockout",
    "knockout_curve",
    "path",
    "relevance",
    "self_repair",
]
