"""Weights: what attention heads and other components would do with any input, read from their weights alone."""

from cutaway.weights.circuits import TokenPairs, circuits
from cutaway.weights.composition import Composition, composition

__all__ = ["Composition", "TokenPairs", "circuits", "composition"]
