"""Data whose true features are known, to judge dictionaries by: synthetic benchmarks and toys."""

from cutaway.dictionaries.truth.law import Law
from cutaway.dictionaries.truth.stream import TruthStream
from cutaway.dictionaries.truth.synthetic import RECIPES, WIDTHS, Recipe, synthetic
from cutaway.dictionaries.truth.toys import absorption, hedging, superposition, zipf_toy
from cutaway.dictionaries.truth.truth import Batches, Truth

__all__ = [
    "RECIPES",
    "WIDTHS",
    "Batches",
    "Law",
    "Recipe",
    "Truth",
    "TruthStream",
    "absorption",
    "hedging",
    "superposition",
    "synthetic",
    "zipf_toy",
]
