"""Clean and corrupt runs of a task, with their activations and metrics; every patching method starts from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.out_of_memory import in_halves
from cutaway.core.refuse import Refused
from cutaway.models.access import taps
from cutaway.models.access.capture import Activations, Collector
from cutaway.models.access.reading import observe
from cutaway.models.anatomy import rope
from cutaway.models.model import Model
from cutaway.models.sweep.plan import room
from cutaway.models.tokens import Tokens
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

Direction = Literal["denoise", "noise"]


@dataclass(frozen=True)
class PairedRuns:
    """A run that is patched, and the run that gives the values.

    Attributes:
        bound: the task as tokens of the model.
        target: the prompts that are patched.
        own: their activations.
        donor: activations of the giving run.
        clean: metric of the clean run, per prompt.
        corrupt: metric of the corrupt run, per prompt.
        baseline: metric of the unpatched target, per prompt.
        gap: mean of clean − corrupt; recovery is a share of it.
        corruption: the corruption in words.
    """

    bound: Bound
    target: Tokens
    own: Activations
    donor: Activations
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    baseline: Float[Tensor, "prompt"]
    gap: float
    corruption: str

    def record(self) -> dict[str, Any]:
        """Return the entries of a patching result's record beyond its options."""
        return corruption_record(self.corruption)


def corruption_record(corruption: str) -> dict[str, Any]:
    """Return the entries of a patching result's record beyond its options."""
    return {"corruption": corruption, "sign": "positive is more answer"}


def between(
    model: Model, bound: Bound, sites: str | Sequence[str | Address], direction: Direction, corruption: str
) -> PairedRuns:
    """Run clean and corrupt prompts and capture some sites of both, whatever their difference is."""
    (clean, first), (corrupt, second) = (run(model, t, sites, bound) for t in (bound.clean, bound.corrupt))
    gap, denoise = float((clean - corrupt).mean()), direction == "denoise"
    target, own, donor = (bound.corrupt, second, first) if denoise else (bound.clean, first, second)
    return PairedRuns(bound, target, own, donor, clean, corrupt, corrupt if denoise else clean, gap, corruption)


def run(
    model: Model, tokens: Tokens, sites: str | Sequence[str | Address], bound: Bound
) -> tuple[Float[Tensor, "prompt"], Activations]:
    """Run prompts once, in parts where memory runs out; return the metric of each and the activations at some sites."""
    measure = bound.measure
    places, parts, done = model.places(sites), list[tuple[Tensor, Activations]](), list[Sequence[int]]()

    def work(rows: Sequence[int]) -> None:
        some = tokens if len(rows) == len(tokens) else tokens.rows(rows)
        collector = Collector(model.anatomy, places, live=False)
        with model.edited(), torch.no_grad():
            with taps.attached(model.anatomy, {p: collector.see(p) for p in collector.places}):
                seen = observe(model.anatomy, some, measure.reads)
            prompt = torch.tensor(rows, device=tokens.ids.device)
            parts.append((measure(seen, prompt).float(), collector.activations(some)))
            done.append(rows)

    for rows in rope.apart(model.anatomy, tokens):
        in_halves(rows, room(model, tokens.ids.shape[1]) // tokens.ids.shape[1], work)
    if len(parts) == 1:
        return parts[0]
    acts = {
        a: rope.in_order(done, [found[str(a)] for _, found in parts]) for a in dict.fromkeys(p.place for p in places)
    }
    return rope.in_order(done, [values for values, _ in parts]), Activations(acts, tokens)


def difference(task: Task, clean: Float[Tensor, "prompt"], corrupt: Float[Tensor, "prompt"]) -> float:
    """Return the mean of clean − corrupt.

    Raises:
        Refused: there is none, or it is not a number.
    """
    gap = float((clean - corrupt).mean())
    if not math.isfinite(gap):
        raise Refused(f"patching on task {task.name!r}", f"the metric is {gap}", "use a wider dtype or other prompts")
    if abs(gap) < 1e-6:
        why = "the corruption does not change the metric, so there is nothing to bring back"
        raise Refused(f"patching on task {task.name!r}", why, "use prompts whose answers differ")
    return gap


def first_changed(model: Model, bound: Bound) -> int:
    """Return the first position where any corrupt prompt has another token: before it a causal model's two runs are
    one.
    """
    changed = bound.changed
    front = torch.where(changed.any(1), changed.int().argmax(1) - bound.clean.column(0), bound.clean.lengths)
    return int(front.min()) if model.family.causal and bool(changed.any()) else 0
