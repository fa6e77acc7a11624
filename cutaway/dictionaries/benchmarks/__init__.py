"""Data whose true features are known, to judge dictionaries by: synthetic benchmarks and toys."""

from cutaway.dictionaries.benchmarks.generative import Law
from cutaway.dictionaries.benchmarks.stream import TruthStream
from cutaway.dictionaries.benchmarks.synthetic import RECIPES, WIDTHS, SyntheticRecipe, synthetic
from cutaway.dictionaries.benchmarks.toys import absorption, hedging, superposition, zipf_toy
from cutaway.dictionaries.benchmarks.truth import Batches, Truth

__all__ = [
    "RECIPES",
    "WIDTHS",
    "Batches",
    "Law",
    "SyntheticRecipe",
    "Truth",
    "TruthStream",
    "absorption",
    "hedging",
    "superposition",
    "synthetic",
    "zipf_toy",
]
