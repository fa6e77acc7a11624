"""The log of a training run at Weights & Biases as well as in `log.jsonl`; needs the extra `wandb`.

With WANDB_MODE=offline nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from cutaway.core.refuse import Refused

Numbers = Callable[[Mapping[str, Any]], Mapping[str, float]]


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of the log by name, those of an inner table as `table/name`; an event counts 1."""
    if "event" in line:
        return {f"event/{line['event']}": 1.0}
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{n}": v for n, v in value.items()}
        elif isinstance(value, int | float) and name != "step":
            found[name] = value
    return found


@contextmanager
def wandb_log(
    project: str, about: Mapping[str, Any], numbers: Numbers = numbers
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Open a run of a project and yield a function that takes lines of the log, for `on_log`.

    Args:
        project: its name at Weights & Biases.
        about: the configuration shown with the run.
        numbers: names and values of the curves to which a line adds a point.

    Raises:
        Refused: wandb is not installed.
    """
    try:
        wandb: Any = import_module("wandb")
    except ImportError:
        why = "the package wandb is not installed"
        raise Refused(f"logging to {project!r}", why, "pip install 'cutaway[wandb]', or read log.jsonl") from None
    run = wandb.init(project=project, config=dict(about))
    try:
        yield lambda line: run.log(numbers(line), step=line["step"])
    finally:
        run.finish()
