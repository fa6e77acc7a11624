"""Tasks of small programs, such as those compiled into models of the zoo: the program gives the prompts."""

from __future__ import annotations

from typing import Any

from cutaway.core.refuse import Keyword, Refused
from cutaway.tasks.pair import Pair, Truth
from cutaway.tasks.task import Task

CORRUPTION = "other_text"
_LINES = 32  # prompts of which the words are collected
_SAYS = "the text becomes another random one of its length, with another answer"


def from_program(program: Any, n: int, seed: int, corruption: str | None, split: str | None) -> Task:
    """Return `n` random prompts of a program, each with another one as its counterfactual.

    Raises:
        Refused: another corruption, a split, or a program whose answers hardly differ.
    """
    if corruption not in (None, CORRUPTION):
        what = f"corruption {corruption!r} of task {program.name!r}"
        raise Refused(what, "a program does not make it", f"use {CORRUPTION}")
    if split is not None:
        what = (f"task {program.name!r} with ", Keyword("split", split, of="task"))
        raise Refused(what, "a program has no material withheld from training", "leave it out")
    lines = program.lines(n, seed)
    pairs = tuple(Pair(x.clean, x.corrupt, f" {x.answer}", f" {x.foil}", joined=True) for x in lines)
    truth = Truth(f"the answer is {program.says}", "the program in plain Python", positions=("changed", "last"))
    return Task(program.name, pairs, "logit_diff", _SAYS, truth, {"n": n, "seed": seed})


def kinds(program: Any) -> list[frozenset[str]]:
    """Return the sets of words that stand for one another: those of a program's prompts, and its answers."""
    lines = program.lines(_LINES)
    said = frozenset(w for x in lines for w in x.clean.split() if w.isalnum())
    return [said, frozenset(x.answer for x in lines)]
