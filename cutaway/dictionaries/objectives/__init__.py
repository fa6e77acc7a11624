"""Objectives: the terms that training adds to the squared error.

Each term is a class, and a formula on the pass of one batch. `TERMS` names those that are plain data, which a recipe
can be saved with; a term that holds a function (`Spliced`) is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutaway.core.refuse import Refused
from cutaway.dictionaries.objectives.auxiliary import AuxK, Matryoshka, MultiTopK, OpenGate
from cutaway.dictionaries.objectives.penalties import L0, L1, Frequency, L0Target, PreActivation, Tanh
from cutaway.dictionaries.objectives.spliced import Spliced
from cutaway.dictionaries.objectives.term import Part, Pass, Term

TERMS: dict[str, type[Term]] = {
    t.__name__: t for t in (L0, L1, AuxK, Frequency, L0Target, Matryoshka, MultiTopK, OpenGate, PreActivation, Tanh)
}

__all__ = [
    "L0", "L1", "TERMS", "AuxK", "Frequency", "L0Target", "Matryoshka", "MultiTopK", "OpenGate", "Part", "Pass",
    "PreActivation", "Spliced", "Tanh", "Term", "term_of",
]  # fmt: skip


def term_of(numbers: Mapping[str, Any]) -> Term:
    """Rebuild the term that `as_dict` described.

    Raises:
        Refused: no such term, or one that holds a function.
    """
    kind = numbers.get("kind")
    if kind not in TERMS:
        raise Refused(f"objective {kind!r}", "no term of that name is plain data", f"use one of {', '.join(TERMS)}")
    return TERMS[kind](**{n: tuple(v) if isinstance(v, list) else v for n, v in numbers.items() if n != "kind"})
