"""Objectives: what training adds to the squared error. One class a term; every term is a formula on a batch's pass."""

from cutaway.dictionaries.training.objectives.auxiliary import AuxK, Matryoshka, MultiTopK, OpenGate
from cutaway.dictionaries.training.objectives.penalties import L0, L1, Frequency, L0Target, PreActivation, Tanh
from cutaway.dictionaries.training.objectives.spliced import Spliced
from cutaway.dictionaries.training.objectives.term import Part, Pass, Term, term_of

__all__ = [
    "L0", "L1", "AuxK", "Frequency", "L0Target", "Matryoshka", "MultiTopK", "OpenGate", "Part", "Pass",
    "PreActivation", "Spliced", "Tanh", "Term", "term_of",
]  # fmt: skip
