"""The subjects `task`, `prompts`, `contrast` and `repeats`: the flags that mean one, and how it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.jsonl import from_jsonl
from cutaway.tasks.named import load
from cutaway.tasks.prompts import Contrast, Prompts, as_prompts, contrast, joined, read_prompts
from cutaway.tasks.repeats import Repeats
from cutaway.tasks.sentence import from_sentence
from cutaway.tasks.siblings import with_siblings
from cutaway.tasks.task import Task

_FLAGS = (
    Flag("task", str, REQUIRED, "name (see `cutaway tasks`), a .jsonl file, or one sentence in quotes"),
    Flag("task_n", int | None, None, "number of pairs [default: 64; of a file, all]"),
    Flag("task_seed", int | None, None, "seed of the pairs [default: 0]"),
    Flag("task_corruption", str | None, None, "which corruption, where a task has several; of a file, its name"),
    Flag("task_split", str | None, None, "of a world: test, train or any"),
    Flag("task_metric", str | None, None, "name of the metric [default: the task's own]"),
    Flag("task_narrow", bool, False, "answers of several tokens count by the first that differs"),
    Flag("task_target", str | None, None, "of a sentence: the answer in question"),
    Flag("task_foil", str | None, None, "of a sentence: the answer to compare with"),
    Flag("task_corrupt", str | None, None, "of a sentence: its corrupt version"),
    Flag("task_subject", str | None, None, "of a sentence: the part of it that is asked about"),
    Flag("task_joined", bool, False, "of a sentence: target and foil go on with its last word, as written"),
    Flag("task_siblings", int | None, None, "of a sentence: so many of the same form, itself among them"),
    Flag("task_sentence", str | None, None, "the sentence, with --task sentence"),
    Flag("task_path", Path | None, None, "the file, where --task gives a name of your own"),
)


def from_flags(model: Model, task: str, **flags: Any) -> Task:
    """Make the task that the flags mean: a file, one sentence, or a task by name.

    Raises:
        Refused: a flag that says nothing of such a task, or no such task.
    """
    f = {n: v for k, v in flags.items() if (n := k.removeprefix("task_")) and v is not None and v is not False}
    narrow = f.pop("narrow", False)
    if "path" in f or task.endswith(".jsonl"):
        _only(f, "a file", ("path", "n", "metric", "corruption"))
        name: dict[str, Any] = {"name": task} if "path" in f else {}
        found = from_jsonl(f.pop("path", task), **f, **name)
    elif "sentence" in f or " " in task.strip():
        _only(f, "a sentence", (*_OF_SENTENCE, "sentence", "siblings", *(("seed",) if "siblings" in f else ())))
        siblings, seed = f.pop("siblings", None), f.pop("seed", 0)
        found = from_sentence(model, f.pop("sentence", task), **f)
        found = found if siblings is None else with_siblings(model, found, siblings, seed)
    else:
        _only(f, f"the task {task!r}", ("n", "seed", "corruption", "split", "metric"))
        found = load(task, model, **f)
    return found.narrow(model) if narrow else found


_OF_SENTENCE = ("target", "foil", "corrupt", "subject", "metric", "joined")


def _only(given: Mapping[str, Any], kind: str, allowed: Sequence[str]) -> None:
    for name in given:
        if name not in allowed:
            may = ", ".join(f"--task-{a}" for a in allowed)
            raise Refused(f"--task-{name} with {kind}", "it says nothing of such a task", f"leave it out; it has {may}")


def _open_task(flags: Mapping[str, Any], opened: Mapping[str, Any]) -> Task:
    return from_flags(opened["model"], **flags)


def _split(task: Task) -> list[Task]:
    return [replace(task, pairs=(p,), made=None) for p in task.pairs]


def _join(parts: Sequence[Task]) -> Task:
    return replace(parts[0], pairs=tuple(p for t in parts for p in t.pairs), made=None)


def _prompts(opened: Mapping[str, Any]) -> Prompts:
    task = opened.get("task")
    texts = (
        [p.clean for p in task.pairs] if task is not None else ["The capital of Norway is", "The capital of Japan is"]
    )
    return Prompts(tuple(texts))


def _contrast(opened: Mapping[str, Any]) -> Contrast:
    one = _prompts(opened)
    return Contrast(one, Prompts(tuple(reversed([t.rsplit(" ", 1)[0] for t in one]))))


_IN_HAND = (str, list, tuple, Tensor, Tokens)
_A_TEXT = "one prompt in quotes, or a .txt file with a prompt per line"
register(
    Subject(
        "task",
        Task,
        _FLAGS,
        _open_task,
        lambda opened: load("facts", opened["model"], 2),
        _split,
        _join,
        advice="ca.tasks.from_sentence(model, text), which finds a foil and a corrupt prompt, or another task",
    )
)
register(
    Subject(
        "prompts",
        Prompts,
        (Flag("prompts", str, REQUIRED, _A_TEXT),),
        lambda flags, opened: read_prompts(flags["prompts"]),
        _prompts,
        Prompts.split,
        joined,
        accept=lambda source: as_prompts(source) if isinstance(source, _IN_HAND) else None,
        advice="a text, a list of texts, or token ids",
    )
)
register(
    Subject(
        "contrast",
        Contrast,
        (
            Flag("contrast_positive", str, REQUIRED, f"prompts with what is asked about: {_A_TEXT}"),
            Flag("contrast_negative", str, REQUIRED, f"prompts without it: {_A_TEXT}"),
        ),
        lambda flags, opened: contrast(*(read_prompts(v) for v in flags.values())),
        _contrast,
    )
)
register(
    Subject(
        "repeats",
        Repeats,
        (
            Flag("repeats", int, 32, "number of sequences of random tokens, each a block said twice"),
            Flag("repeats_length", int, 24, "number of tokens in a block"),
            Flag("repeats_seed", int, 0, "seed of the tokens"),
        ),
        lambda flags, opened: Repeats(flags["repeats"], flags["repeats_length"], flags["repeats_seed"]),
        lambda opened: Repeats(3, 8),
        advice="ca.tasks.Repeats(), sequences of random tokens",
    )
)
