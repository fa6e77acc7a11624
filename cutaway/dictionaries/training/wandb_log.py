"""The log of a training run at Weights & Biases as well, beside `log.jsonl`; needs the extra `wandb`.

A line of the log becomes one step there, its numbers under the recipe's number and learning rate (`0@0.001/fvu`), so
that the curves of a probe and of several dictionaries lie in one chart. With WANDB_MODE=offline nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from cutaway.core.refuse import Refused

_ALL = ("step", "tokens", "tokens_per_second", "seconds_left", "factor")  # the same for every dictionary of a step


@contextmanager
def wandb_log(project: str, about: Mapping[str, Any]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A run of the project; what it yields takes lines of the log: `train(…, told=it)`.

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


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by the names they have there; an event counts 1."""
    if "event" in line:
        return {f"event/{line['event']}": 1.0}
    own = {n: v for n, v in line.items() if n not in (*_ALL, "recipe", "rate", "terms")}
    own |= {f"terms/{n}": v for n, v in line["terms"].items()} if "terms" in line else {}
    prefix = f"{line['recipe']}@{line['rate']:.3g}"
    return {n: line[n] for n in _ALL if n != "step"} | {f"{prefix}/{n}": v for n, v in own.items()}
