"""Attribution graphs: which features, neurons and tokens make a model say something, along which edges."""

from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.feature_circuit import FeatureCircuit, feature_circuit
from cutaway.graphs.prune import PRESETS, prune
from cutaway.graphs.subject import Neurons
from cutaway.graphs.trace import trace

__all__ = ["PRESETS", "AttributionGraph", "FeatureCircuit", "Neurons", "feature_circuit", "prune", "trace"]
