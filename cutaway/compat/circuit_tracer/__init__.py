"""circuit-tracer: replacement models, interventions on their features, and attribution graphs."""

from cutaway.compat.circuit_tracer import attribution, graph, replacement_model, serving, utils
from cutaway.compat.circuit_tracer.attribution import attribute
from cutaway.compat.circuit_tracer.graph import Graph
from cutaway.compat.circuit_tracer.replacement_model import ReplacementModel

__all__ = ["Graph", "ReplacementModel", "attribute", "attribution", "graph", "replacement_model", "serving", "utils"]
