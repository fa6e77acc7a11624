"""Names of the positions that prompts share, on the axes of results."""

from __future__ import annotations

from cutaway.interventions.components import positions
from cutaway.interventions.spans import position_names
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task


def names_of(model: Model, about: Task | Prompts, tokens: Tokens) -> list[str]:
    """Return the name of each position: of a task its word or its role, of prompts alone the word if all share it; a
    number where there is neither.
    """
    if isinstance(about, Task):
        bound = about.bind(model, "logit_diff")
        if not bound.clean.tails and bool((bound.clean.lengths == tokens.lengths).all()):
            return position_names(bound)
    if len(tokens) == 1:
        return tokens.labels(0)
    words, names = [tokens.names(i) for i in range(len(tokens))], list[str]()
    for p in positions(tokens):
        shared = {row[p] for row in words}
        names.append(f"{shared.pop() if len(shared) == 1 else ''}@{p}")
    return names
