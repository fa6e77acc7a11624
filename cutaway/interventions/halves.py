"""Halves of a task: prompts to choose on, and others to measure the choice on."""

from __future__ import annotations

from cutaway.core.refuse import Refused
from cutaway.tasks.task import Task


def halves(task: Task) -> tuple[Task, Task, str]:
    """Return the prompts to rank on, prompts to measure on, and a sentence about them."""
    try:
        first, second = task.split(0.5, seed=0)
    except Refused:
        first = second = task.take(1)
    if min(len(first), len(second)) < 2:
        return task, task, "ranked and measured on the same prompts: they are too few to split"
    return first, second, f"ranked on {len(first)} prompts, measured on {len(second)} others (task.split(0.5, seed=0))"
