"""Dry runs: the cost of a call, planned and counted without making it.

    ca.suites.dry_run(ca.patching.activation, model, task, site="z")

The call's own code runs on its own model, prompts and options, so it refuses what the call would refuse. What it
repeats is planned and not done (`models.dry`): of a sweep a few variants run, of many backward passes two. Forwards are
those of the plan. Seconds are what was really done, and for what was left out the price of those few. Beside them
stands one plain forward of the prompts, measured.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cutaway.core.method import Method
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.models.dry import Took, planning, settle
from cutaway.models.model import Model
from cutaway.models.sweep.processes import processes
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.repeats import Repeats
from cutaway.tasks.task import Task

_PLAIN = 3  # forwards of which the median is taken
_POSITIONS = 512  # prompts × positions of the batch that tells the price of a forward among many
_STAND_IN = Repeats(4, 8)  # for the prompts of a method that makes its own


@dataclass(frozen=True)
class Plain:
    """A forward of the prompts of a call, without edits.

    Attributes:
        prompts: how many prompts it has.
        tokens: the length of the longest.
        seconds: the time that it takes: the median of three, after one that warms up.
        bytes: the most that its activations take at once, weights and logits left out.
        stand_in: True for random tokens, in place of the prompts that a method makes itself.
    """

    prompts: int
    tokens: int
    seconds: float
    bytes: int
    stand_in: bool = False


@dataclass(frozen=True)
class DryRun:
    """The cost of a call that was not made; None stands for what is unknown before the call.

    Attributes:
        call: name of the method.
        forwards: forwards that it needs, each of one prompt.
        backwards: backwards, likewise.
        seconds: the time that it needs on this machine as it is now, without loading.
        memory: bytes that the process has at its peak, weights included.
        weights: bytes of the model's weights, which are part of it.
        batch: bytes of the largest batch of a sweep, which are part of it; 0 without a sweep.
        plain: one plain forward of the prompts, for comparison.
        spent_forwards: forwards and backwards that the dry run did itself.
        spent_seconds: the time that it took itself.
        says: what the numbers do not say.
    """

    call: str
    forwards: float | None
    backwards: float | None
    seconds: float | None
    memory: int | None
    weights: int
    batch: int
    plain: Plain | None
    spent_forwards: float
    spent_seconds: float
    says: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything, JSON-ready."""
        return asdict(self) | {"says": list(self.says)}

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return it as lines of text."""
        out, p = [f"{self.call}: a dry run, so the method was not run"], self.plain
        if self.forwards is not None:
            whole = (
                f", {self.forwards / p.prompts:,.1f} of the batch"
                if p is not None and not p.stand_in and p.prompts > 1
                else ""
            )
            back = f"; {self.backwards:,.0f} backwards" if self.backwards else ""
            out.append(f"forwards  {self.forwards:,.0f} of one prompt{whole}{back}")
        if self.seconds is not None:
            out.append(f"seconds   {_rounded(self.seconds)} on this machine, as busy as it is now, after loading")
        if self.memory is not None:
            batch = f", a batch of a sweep {_size(self.batch)}" if self.batch else ""
            out.append(f"memory    {_size(self.memory)} at the peak of the process:")
            out.append(f"          weights {_size(self.weights)}{batch}, and what is kept")
        if p is not None:
            shape = f"{p.prompts} prompt{'s' * (p.prompts > 1)}, up to {p.tokens} tokens, median of {_PLAIN}"
            took, own = _rounded(p.seconds), _rounded(self.spent_seconds)
            what = "random tokens" if p.stand_in else "the batch"
            out.append(f"measured  {took} s, {_size(p.bytes)} of activations: a plain forward of {what}")
            out.append(f"          ({shape})")
            out.append(f"spent     {self.spent_forwards:,.0f} forwards, {own} s, by the dry run")
        return out + [f"note      {text}" for text in self.says]


def dry_run(call: Callable[..., Any], /, *subjects: Any, **options: Any) -> DryRun:
    """Return what a call would cost, without making it.

    Args:
        call: a method (`ca.patching.activation`), or `ca.explain`.
        subjects: its positional arguments: the model, the task, …
        options: its options.

    Raises:
        Refused: what the call would refuse, or several processes.
    """
    if processes() > 1:
        raise Refused("a dry run", "several processes would share the work", "start one process")
    row: Method | None = getattr(call, "row", None)
    about: dict[str, Any] = dict(enumerate(subjects)) if row is None else row.asked(subjects, options)[0]  # type: ignore[arg-type]
    model = next((x for x in about.values() if isinstance(x, Model)), None)
    tokens = None if model is None else _batch(model, about.values())
    stand_in = row is not None and model is not None and tokens is None and _sweeps(row)
    if model is not None and stand_in:
        tokens = _STAND_IN.bind(model)
    if row is not None and (model is None or tokens is None):
        return _declared(row, about, options, model)
    if model is None or tokens is None:
        raise Refused("a dry run", f"{getattr(call, '__name__', call)!r} got no model and prompts", "give both")
    start = time.perf_counter()
    says, (plain, took) = list[str](), _plain(model, tokens, stand_in)
    with counting() as spent, planning(took, plain.bytes / tokens.ids.numel()) as planned:
        try:
            call(*subjects, **options)
        except Refused as refusal:
            if not planned.made_up:
                raise
            says.append(f"planned up to a refusal that made-up numbers may have caused: {refusal.why}")
    memory = _peak(model, max(planned.batch, planned.kept))
    if memory is None:
        says.append("the memory of this process cannot be read on this system")
    if planned.seconds == 0.0 and planned.forwards == 0.0:
        says.append("it repeats nothing that can be left out, so that the dry run took as long as the method")
    return DryRun(
        row.name if row is not None else getattr(call, "__name__", "call"),
        spent.forwards + planned.forwards,
        spent.backwards + planned.backwards,
        spent.seconds + planned.seconds,
        memory,
        _weights(model),
        planned.batch,
        plain,
        spent.forwards + spent.backwards,
        time.perf_counter() - start,
        tuple(says),
    )


def _sweeps(row: Method) -> bool:
    """Return True if a method edits the model again and again on prompts of its own; texts it would read through."""
    return row.rung == "interventional" and not {"evidence", "texts"} & {
        name for names in row.takes() for name in names
    }


def _declared(row: Method, about: dict[str, Any], options: dict[str, Any], model: Model | None) -> DryRun:
    """Return what the card of a method tells that does not repeat forwards of a batch of prompts."""
    forwards = backwards = None
    with suppress(ValueError):
        forwards, backwards = row.bound(row.sizes([*about.values()], options))
    says = list[str]()
    if forwards is None:
        says.append(f"forwards are unknown before it runs: its card bounds them by {row.cost}")
    elif forwards == backwards == 0:
        says.append("no model runs: its time depends on the dictionary and its activations alone")
    else:
        says.append("at most these, by its card; it reads texts of many lengths, of which none was measured")
    says.append("seconds and memory are unknown before it runs")
    weights = 0 if model is None else _weights(model)
    return DryRun(row.name, forwards, backwards, None, None, weights, 0, None, 0.0, 0.0, tuple(says))


def _batch(model: Model, subjects: Iterable[Any]) -> Tokens | None:
    """Return the prompts of a call as tokens; None if it has none."""
    for thing in subjects:
        if isinstance(thing, Task):
            return thing.bind(model).clean
        if isinstance(thing, Prompts | Repeats):
            return thing.bind(model)
        if isinstance(thing, str):
            return model.tokens([thing])
    return None


def _plain(model: Model, tokens: Tokens, stand_in: bool) -> tuple[Plain, Took]:
    """Measure a forward of the prompts, without edits, and one of as many copies of them as make a batch of a sweep."""
    last = f"resid_pre.{model.shape.n_layers - 1}"
    with _Live(model.hf.parameters()) as live:
        model.capture(tokens, last, logits=False)
    n, times = len(tokens), max(1, _POSITIONS // tokens.ids.numel())
    many = tokens.rows(list(range(n)) * times)
    _seconds(model, tokens)
    took = statistics.median(_seconds(model, tokens) for _ in range(_PLAIN))
    plain = Plain(n, tokens.ids.shape[1], took, live.most, stand_in)
    return plain, Took(1, n * times, _seconds(model, many) if times > 1 else plain.seconds)


def _seconds(model: Model, tokens: Tokens) -> float:
    """Return the time that a forward takes."""
    start = time.perf_counter()
    model.run_last(tokens)
    settle()
    return time.perf_counter() - start


class _Live(TorchDispatchMode):
    """Follows how much memory tensors hold that are made inside; those of `apart` do not count."""

    def __init__(self, apart: Iterable[torch.Tensor]):
        super().__init__()
        self.apart = {t.untyped_storage()._cdata for t in apart}
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.layout is torch.strided:
                storage = t.untyped_storage()
                if storage._cdata not in self.apart:
                    self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.held = {key: (ref, size) for key, (ref, size) in self.held.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return out


def _weights(model: Model) -> int:
    return sum(p.numel() * p.element_size() for p in model.hf.parameters())


def _peak(model: Model, batch: int) -> int | None:
    """Return the peak of the memory: what there was so far, or what there is now with a batch beside it."""
    if model.device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(model.device), torch.cuda.memory_allocated(model.device) + batch)
    now = Path("/proc/self/statm")
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    held = int(now.read_text().split()[1]) * resource.getpagesize() if now.exists() else most
    return max(most, held + batch)


def _rounded(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.1f} MiB"


__all__: Sequence[str] = ["DryRun", "Plain", "dry_run"]
