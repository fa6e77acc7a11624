"""Tasks by name: prompts of a model's own world, or templates filled with words that its tokenizer knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from cutaway.core.refuse import Code, Keyword, Refused, nearest
from cutaway.core.repeat import Made, called
from cutaway.models.model import Model
from cutaway.tasks.pair import Truth
from cutaway.tasks.program import from_program
from cutaway.tasks.readouts import Readout
from cutaway.tasks.sampler import sample
from cutaway.tasks.task import Task, made
from cutaway.tasks.templates import KNOWN
from cutaway.tasks.templates import ROWS as TASKS
from cutaway.tasks.world import SAYS, behaviours, from_world

MOST = 100_000  # pairs of a task that are made at once


def names(model: Model | None = None) -> list[str]:
    """Return the names that `load` takes; with a model that has a world, those of its other behaviours too, and with a
    model of a program, that of the program alone.
    """
    if (program := getattr(model, "program", None)) is not None:
        return [program.name]
    if getattr(model, "world", None) is None:
        return [*TASKS]
    covered = {b for n in TASKS for b in behaviours(n)}
    return [*TASKS, *(b for b in SAYS if b not in covered)]


def load(
    name: str,
    model: Model,
    n: int = 64,
    seed: int = 0,
    *,
    corruption: str | None = None,
    split: str | None = None,
    metric: str | Readout | Callable[..., Tensor] | None = None,
) -> Task:
    """Return the task called `name` for one model: up to `n` pairs, the same for the same seed.

    Args:
        name: one of `names(model)`.
        model: a loaded model; its tokenizer decides which words can be used, its world or program (if any) gives the
            prompts.
        n: how many pairs.
        seed: of the sampler.
        corruption: which corruption, where a task has several (`ioi`: s2_io_flip, abc; `arithmetic`: no_operator); the
            first if not given.
        split: of a world: `test` (withheld from training; the default), `train` or `any`.
        metric: name of a readout, a readout, or a function of your own; the task's own if not given.

    Raises:
        Refused: unknown task, corruption or split, or a tokenizer that allows too few pairs.
    """
    if not 1 <= n <= MOST:
        why = "there would be no prompts" if n < 1 else f"at most {MOST:,} are made at once"
        raise Refused(
            (f"task {name!r} with ", Keyword("n", n, of="task")),
            why,
            "ask for at least one" if n < 1 else "ask for fewer",
        )
    known = names(model)
    parts = {b for task in known for b in behaviours(task)} if getattr(model, "world", None) is not None else set()
    if name not in known and name not in parts:
        close = nearest(name, known)
        why = "no task has that name" + (f"; did you mean {close}?" if close else "")
        raise Refused(f"task {name!r}", why, (f"use one of: {', '.join(known)}, or ", Code("from_jsonl(path)")))
    if model.program is not None:
        task = from_program(model.program, n, seed, corruption, split)
    elif getattr(model, "world", None) is not None:
        task = from_world(model, name, n, seed, corruption, split or "test")
    else:
        task = _from_templates(name, model, n, seed, corruption, split)
    told = {"n": n, "seed": seed, "corruption": corruption, "split": split, "metric": metric}
    how = Made(called("ca.tasks.load", repr(name), "model", **told), {"": name, **told})
    named = metric is None or isinstance(metric, str)  # a function of the user's own has no name to repeat it by
    return made(task if metric is None else replace(task, metric=metric), how if named else None, model)


def _from_templates(name: str, model: Model, n: int, seed: int, corruption: str | None, split: str | None) -> Task:
    row = TASKS[name]
    chosen = corruption or next(iter(row.corruptions))
    if chosen not in row.corruptions:
        have = ", ".join(row.corruptions)
        raise Refused(f"corruption {chosen!r} of task {name!r}", "the task does not have it", f"use one of: {have}")
    if split is not None:
        why = "templates have no material withheld from training"
        raise Refused(
            (f"task {name!r} with ", Keyword("split", split, of="task")),
            why,
            ("leave it out, or use ", Code("task.split()")),
        )
    how = row.corruptions[chosen]
    pairs = tuple(sample(row, model, n, seed, how))
    truth = KNOWN.get((name, str(model.name).removeprefix("openai-community/")))
    note = "by construction only the changed words tell the clean from the corrupt answer"
    truth = truth or Truth(note, "the template", positions=row.positions)
    options = {"n": n, "seed": seed} | ({"corruption": chosen} if corruption else {})
    return Task(name, pairs, row.metric, how.says, truth, options)
