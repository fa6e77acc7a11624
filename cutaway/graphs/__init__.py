"""Attribution graphs: which features, neurons and tokens make a model say something, along which edges."""

from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.circuit_curve import CircuitCurve, circuit_curve
from cutaway.graphs.circuit_tracer import read_raw_graph
from cutaway.graphs.feature_circuit import FeatureCircuit, feature_circuit
from cutaway.graphs.grouping import Supernodes, read_supernodes
from cutaway.graphs.head_loadings import HeadLoadings, head_loadings
from cutaway.graphs.labels import store_labels
from cutaway.graphs.neuronpedia import graph_data, read_graph, write_graph
from cutaway.graphs.prune import PRESETS, prune
from cutaway.graphs.qk import QkAttribution, qk
from cutaway.graphs.stability import GraphStability, stability
from cutaway.graphs.subject import Neurons
from cutaway.graphs.supernodes import SupernodeEffects, supernodes
from cutaway.graphs.trace import trace
from cutaway.graphs.validate import GraphValidation, validate

__all__ = [
    "PRESETS",
    "AttributionGraph",
    "CircuitCurve",
    "FeatureCircuit",
    "GraphStability",
    "GraphValidation",
    "HeadLoadings",
    "Neurons",
    "QkAttribution",
    "SupernodeEffects",
    "Supernodes",
    "circuit_curve",
    "feature_circuit",
    "graph_data",
    "head_loadings",
    "prune",
    "qk",
    "read_graph",
    "read_raw_graph",
    "read_supernodes",
    "stability",
    "store_labels",
    "supernodes",
    "trace",
    "validate",
    "write_graph",
]
