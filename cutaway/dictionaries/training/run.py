"""The training run: one or several dictionaries on one stream of activations, with checkpoints and a log.

A run is a folder: `checkpoint.safetensors` or, of several processes, `checkpoint.json` with its folders (see
`cutaway.training`), and `log.jsonl` with a line per dictionary and report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from cutaway.core.cursor import Source
from cutaway.core.refuse import Refused
from cutaway.dictionaries.kernels import precision
from cutaway.dictionaries.training.mesh import LatentShards, mesh
from cutaway.dictionaries.training.plan import Plan
from cutaway.dictionaries.training.recipe import Recipe
from cutaway.dictionaries.training.update import DictionaryUpdate
from cutaway.models.sweep.processes import processes
from cutaway.training.loop import Loop
from cutaway.training.wandb_log import numbers
from cutaway.training.wandb_log import wandb_log as wandb_run

_ALL = ("tokens", "tokens_per_second", "seconds_left", "factor")  # the same for every dictionary of a step


@dataclass(frozen=True)
class Progress:
    """State of a run at its last report, for the callback `progress`."""

    tokens: int
    of: int
    loss: float
    fvu: float
    tokens_per_second: float
    seconds_left: float


def train(
    source: Source | Any,
    recipes: Recipe | Sequence[Recipe],
    plan: Plan,
    *,
    out: str | Path | None = None,
    resume: bool = True,
    device: torch.device | str | Any = "cpu",
    progress: Callable[[Progress], None] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    stop_after: int | None = None,
) -> Any:
    """Train a dictionary, or several on the same stream of activations.

    Args:
        source: batches of activations with an exact cursor: a stream, a truth's stream, or `Held`.
        recipes: a recipe, or a list of recipes that see the same batches.
        plan: how long and how exactly.
        out: folder of the run, for checkpoints and the log; None keeps nothing.
        resume: go on from the checkpoint in `out`, if there is one.
        device: where the weights are; in a process group, as torchrun starts it, `train.mesh(replicas)` (or all
            latents are sharded, on the devices of the group).
        progress: called whenever the log gets lines, in the main process.
        on_log: called with every line of the log, in the main process; `wandb_log` makes one.
        stop_after: end at this step with a checkpoint, as an interruption would.

    Returns:
        The `Trained` dictionary of one recipe, or a list of them.

    Raises:
        Refused: a source without a cursor or tokens, a checkpoint of another run, a folder or device that cannot be
            used, or a loss that is not a number.
        KeyboardInterrupt: as it came; with `out`, the last whole step is in the checkpoint, and the same call goes on.
    """
    if isinstance(device, torch.device | str):
        _check_device(device)
    shards = None
    if processes() > 1:
        shards = LatentShards(device if isinstance(device, DeviceMesh) else mesh())
        device = shards.device
    update = DictionaryUpdate([recipes] if isinstance(recipes, Recipe) else recipes, plan, device, shards)
    loop = Loop(update, source, plan, out, on_log=on_log)
    loop.start(resume)

    def report(loop: Loop) -> None:
        if progress is not None:
            forecast, (loss, fvu) = loop.forecast(), update.best()
            of = max(loop.tokens, plan.tokens)
            progress(Progress(loop.tokens, of, loss, fvu, forecast.tokens_per_second, forecast.seconds_left))

    with precision.products(update.choice):
        loop.run(stop_after, report)
    results = update.results(loop)
    return results[0] if isinstance(recipes, Recipe) else results


def _check_device(device: torch.device | str) -> None:
    """Refuse a device that this machine does not have."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = f"it cannot be used: {str(error).splitlines()[0]}"
        raise Refused(f"device {str(device)!r}", why, "use cpu, or another device") from error


@contextmanager
def wandb_log(project: str, about: Mapping[str, Any]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Open a run at Weights & Biases and yield a function that takes lines of the log: `train(…, on_log=it)`.

    The numbers of a dictionary stand under its recipe's number and learning rate (`0@0.001/fvu`), so that the curves of
    a probe and of several dictionaries lie in one chart.

    Raises:
        Refused: wandb is not installed.
    """
    with wandb_run(project, about, _numbers) as on_log:
        yield on_log


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line, those of one dictionary under its prefix."""
    if "event" in line:
        return numbers(line)
    prefix = f"{line['recipe']}@{line['rate']:.3g}"
    found = numbers({n: v for n, v in line.items() if n not in ("recipe", "rate")})
    return {n if n in _ALL else f"{prefix}/{n}": v for n, v in found.items()}
