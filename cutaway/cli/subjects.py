"""Models and tasks from the flags that name them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from cutaway.models.model import Model
    from cutaway.tasks import Task

DEFAULT_MODEL = "miniworld"


@dataclass(frozen=True)
class Flag:
    """One flag of a subject, as every command that takes the subject offers it."""

    name: str
    type: Any
    default: Any
    help: str

    def parameter(self, subject: str) -> inspect.Parameter:
        """The flag as a parameter of a command's signature."""
        negative = "" if self.type is bool else None
        hint = Annotated[self.type, Parameter(help=self.help, group=subject.capitalize(), negative=negative)]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=hint)


FLAGS: dict[str, tuple[Flag, ...]] = {
    "model": (
        Flag("model", str, DEFAULT_MODEL, "zoo name, folder, or Hugging Face id (org/name@revision)"),
        Flag("model_dtype", str | None, None, "dtype of the weights, such as bfloat16"),
        Flag(
            "model_device",
            str | None,
            None,
            "device, such as cuda:0; auto spreads over all, tensor_parallel over torchrun's",
        ),
        Flag("model_attention", str | None, None, "implementation of attention, such as eager [default: the model's]"),
    ),
    "task": (
        Flag(
            "task", str, inspect.Parameter.empty, "name (see `cutaway tasks`), a .jsonl file, or one sentence in quotes"
        ),
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
    ),
    "dictionary": (
        Flag(
            "dictionary",
            str,
            inspect.Parameter.empty,
            "a sparse dictionary: a file or folder, or miniworld/NAME; with choices: FILE?site=resid_post.6",
        ),
    ),
}


def load_model(
    model: str = DEFAULT_MODEL,
    model_dtype: str | None = None,
    model_device: str | None = None,
    model_attention: str | None = None,
) -> Model:
    """The model that the flags mean."""
    from transformers.utils import logging

    from cutaway import load

    logging.disable_progress_bar()
    given = {"dtype": model_dtype, "device": model_device, "attention": model_attention}
    return load(model, **{k: v for k, v in given.items() if v is not None})


def load_task(model: Model, task: str, **flags: Any) -> Task:
    """The task that the flags mean: a file, one sentence, or a task by name.

    Raises:
        Refused: a flag that says nothing of such a task, or no such task.
    """
    from cutaway import tasks

    f = {n: v for k, v in flags.items() if (n := k.removeprefix("task_")) and v is not None and v is not False}
    narrow = f.pop("narrow", False)
    if "path" in f or task.endswith(".jsonl"):
        _only(f, "a file", ("path", "n", "metric", "corruption"))
        name: dict[str, Any] = {"name": task} if "path" in f else {}
        found = tasks.from_jsonl(f.pop("path", task), **f, **name)
    elif "sentence" in f or " " in task.strip():
        _only(f, "a sentence", (*_OF_SENTENCE, "sentence", "siblings", *(("seed",) if "siblings" in f else ())))
        siblings, seed = f.pop("siblings", None), f.pop("seed", 0)
        found = tasks.from_sentence(model, f.pop("sentence", task), **f)
        found = found if siblings is None else tasks.with_siblings(model, found, siblings, seed)
    else:
        _only(f, f"the task {task!r}", ("n", "seed", "corruption", "split", "metric"))
        found = tasks.load(task, model, **f)
    return found.narrow(model) if narrow else found


_OF_SENTENCE = ("target", "foil", "corrupt", "subject", "metric", "joined")


def _only(given: Mapping[str, Any], kind: str, allowed: Sequence[str]) -> None:
    for name in given:
        if name not in allowed:
            may = ", ".join(f"--task-{a}" for a in allowed)
            raise Refused(f"--task-{name} with {kind}", "it says nothing of such a task", f"leave it out; it has {may}")


def load_subjects(names: Sequence[str], given: dict[str, Any]) -> list[Any]:
    """The subjects of a method from all flags together; what they leave over is options."""
    found: list[Any] = []
    model = None
    for name in names:
        flags = {f.name: given.pop(f.name, f.default) for f in FLAGS[name]}
        if name == "model":
            model = load_model(**flags)
            found.append(model)
        elif name == "task":
            assert model is not None
            found.append(load_task(model, **flags))
        else:
            import torch

            from cutaway.cli.dict.files import opened

            dictionary = opened(flags["dictionary"])
            wide = torch.promote_types(dictionary.dtype, torch.float32)  # stored in half, computed in single precision
            found.append(dictionary.to(model.device if model is not None else "cpu", wide))
    return found
