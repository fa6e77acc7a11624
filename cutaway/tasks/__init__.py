"""Tasks: prompts in clean and corrupt pairs of equal token length, with answers, metric and known truth.

    task = tasks.load("ioi", model, n=64, seed=0)
    bound = task.bind(model)          # tokens, answer ids, and bound.metric(logits at the last position)

A model that knows its own world (the miniworld) gives its own prompts; any other model gets templates filled with
words that its tokenizer writes as single tokens.
"""

from __future__ import annotations

import cutaway.tasks.subject  # noqa: F401  (the rows of the table of subjects)
from cutaway.tasks.bound import Bound
from cutaway.tasks.concepts import Concepts, concepts
from cutaway.tasks.jsonl import from_jsonl
from cutaway.tasks.labelled import Labelled, Words, read_labelled, read_words
from cutaway.tasks.named import load, names
from cutaway.tasks.needles import Needles, read_needles
from cutaway.tasks.pair import Pair, Truth
from cutaway.tasks.prompts import Contrast, Prompts, as_prompts, contrast, read_prompts
from cutaway.tasks.readouts import READOUTS, Readout, activation, readout
from cutaway.tasks.repeats import Repeats
from cutaway.tasks.sentence import from_sentence
from cutaway.tasks.siblings import with_siblings
from cutaway.tasks.task import Task
from cutaway.tasks.templates import ROWS as TASKS

__all__ = [
    "READOUTS",
    "TASKS",
    "Bound",
    "Concepts",
    "Contrast",
    "Labelled",
    "Needles",
    "Pair",
    "Prompts",
    "Readout",
    "Repeats",
    "Task",
    "Truth",
    "Words",
    "activation",
    "as_prompts",
    "concepts",
    "contrast",
    "from_jsonl",
    "from_sentence",
    "load",
    "names",
    "read_labelled",
    "read_needles",
    "read_prompts",
    "read_words",
    "readout",
    "with_siblings",
]
