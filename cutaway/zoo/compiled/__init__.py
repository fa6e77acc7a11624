"""Models whose circuit is known: small programs compiled into the weights of a GPT-2.

    model = ca.load("compiled/reverse")
    task = ca.tasks.load("reverse", model)
    circuit = structural(model)      # the edges that the program is made of

A program is an expression of `language`; `compiler` makes it an ordinary `GPT2LMHeadModel`; `PROGRAMS` has those of the
zoo, each with the same in plain Python beside it, random prompts and counterfactuals.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutaway.zoo.compiled.compiler import emit, lay_out
    from cutaway.zoo.compiled.program import Line, Program
    from cutaway.zoo.compiled.programs import PROGRAMS
    from cutaway.zoo.compiled.truth import structural

__all__ = ["PROGRAMS", "Line", "Program", "emit", "lay_out", "structural"]
_WHERE = {
    "PROGRAMS": "programs",
    "Line": "program",
    "Program": "program",
    "emit": "compiler",
    "lay_out": "compiler",
    "structural": "truth",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"cutaway.zoo.compiled.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'cutaway.zoo.compiled' has no attribute {name!r}; it has {', '.join(__all__)}")
