"""Weights: what attention heads and other components would do with any input, read from their weights alone."""

from cutaway.weights.circuits import TokenPairs, circuits
from cutaway.weights.composition import Composition, composition
from cutaway.weights.connections import Connections, connections
from cutaway.weights.distances import Distances, distances, pair_scores
from cutaway.weights.spectra import Spectra, spectra
from cutaway.weights.virtual import virtual_head, virtual_pattern, virtual_weights
from cutaway.weights.virtual_heads import VirtualHeads, virtual_heads

__all__ = [
    "Composition",
    "Connections",
    "Distances",
    "Spectra",
    "TokenPairs",
    "VirtualHeads",
    "circuits",
    "composition",
    "connections",
    "distances",
    "pair_scores",
    "spectra",
    "virtual_head",
    "virtual_heads",
    "virtual_pattern",
    "virtual_weights",
]
