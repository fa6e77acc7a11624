"""Models and tasks from the flags that name them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

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
        hint = Annotated[self.type, Parameter(help=self.help, group=subject.capitalize())]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=hint)


FLAGS: dict[str, tuple[Flag, ...]] = {
    "model": (
        Flag("model", str, DEFAULT_MODEL, "zoo name, folder, or Hugging Face id"),
        Flag("model_dtype", str | None, None, "dtype of the weights, such as bfloat16"),
        Flag(
            "model_device",
            str | None,
            None,
            "device, such as cuda:0; auto spreads over all, tensor_parallel over torchrun's",
        ),
    ),
    "task": (
        Flag(
            "task", str, inspect.Parameter.empty, "name (see `cutaway tasks`), a .jsonl file, or one sentence in quotes"
        ),
        Flag("task_n", int, 64, "number of pairs"),
        Flag("task_seed", int, 0, "seed of the pairs"),
        Flag("task_corruption", str | None, None, "which corruption, where a task has several"),
        Flag("task_split", str | None, None, "of a world: test, train or any"),
        Flag("task_target", str | None, None, "of a sentence: the answer in question"),
        Flag("task_foil", str | None, None, "of a sentence: the answer to compare with"),
        Flag("task_corrupt", str | None, None, "of a sentence: its corrupt version"),
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


def load_model(model: str = DEFAULT_MODEL, model_dtype: str | None = None, model_device: str | None = None) -> Model:
    """The model that the flags mean."""
    from transformers.utils import logging

    from cutaway import load

    logging.disable_progress_bar()
    given = {"dtype": model_dtype, "device": model_device}
    return load(model, **{k: v for k, v in given.items() if v is not None})


def load_task(model: Model, task: str, **flags: Any) -> Task:
    """The task that the flags mean: a file, one sentence, or a task by name."""
    from cutaway import tasks

    f = {k.removeprefix("task_"): v for k, v in flags.items()}
    if f["path"] is not None or task.endswith(".jsonl"):
        return tasks.from_jsonl(f["path"] or task, name=task if f["path"] is not None else None)
    if f["sentence"] is not None or " " in task.strip():
        return tasks.from_sentence(model, f["sentence"] or task, f["target"], f["foil"], corrupt=f["corrupt"])
    return tasks.load(task, model, f["n"], f["seed"], corruption=f["corruption"], split=f["split"])


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

            from cutaway.cli.dictionary_files import opened

            dictionary = opened(flags["dictionary"])
            wide = torch.promote_types(dictionary.dtype, torch.float32)  # stored in half, computed in single precision
            found.append(dictionary.to(model.device if model is not None else "cpu", wide))
    return found
