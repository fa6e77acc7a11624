"""Dry runs: work that repeats is planned and counted, and only a few of its repetitions are done.

Within `planning()`, a sweep runs a few of its variants and makes up the values of the others from theirs, a loop over
`some` ends after its first items, and both enter what they left out. So a method's own code says how often it repeats
what, on the very model, prompts and options, and no number that it returns is meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from cutaway.core.record import Cost, counting
from cutaway.core.stats import generator

T = TypeVar("T")

_POSITIONS = 1536  # rows × positions of a sweep that run at most, from which comes the price of the others
_SHARE = 16  # at most one variant in this number runs
_SAMPLES = 8  # batches, after which two variants of a sweep run


@dataclass(frozen=True)
class Took:
    """Some batches that ran: how many, the forwards in them, and their time."""

    jobs: int
    forwards: float
    seconds: float


@dataclass
class Planned:
    """The work that a dry run left out.

    Attributes:
        plain: a plain forward of many prompts, as measured.
        position: bytes that activations take for each row and position of a batch, as measured.
        forwards: forwards left out, of one prompt each.
        backwards: backwards left out, likewise.
        batch: bytes of the largest batch that was planned.
        kept: bytes of what would be held together, beyond what the dry run holds.
        made_up: True if numbers were made up, so that a decision about them says nothing.
    """

    plain: Took | None = None
    position: float = 0.0
    forwards: float = 0.0
    backwards: float = 0.0
    batch: int = 0
    kept: int = 0
    made_up: bool = False
    _ran: list[Took] = field(default_factory=list)  # of sweeps
    _swept: Took = field(default_factory=lambda: Took(0, 0.0, 0.0))  # left out of sweeps
    _repeated: float = 0.0  # seconds of other repetitions that were left out

    @property
    def seconds(self) -> float:
        """The time that it would take."""
        job, forward = prices(self._ran, self.plain)
        return self._repeated + job * self._swept.jobs + forward * self._swept.forwards

    def few(self, variants: Sequence[int], positions: int) -> list[int]:
        """Return some of a sweep's variants, evenly spread, given the rows × positions of each."""
        wanted = -(-_POSITIONS // max(1, positions)) if len(self._ran) < _SAMPLES else 2
        n = min(len(variants), max(2, min(wanted, len(variants) // _SHARE)))
        return [variants[(2 * i + 1) * len(variants) // (2 * n)] for i in range(n)]

    def sweep(self, forwards: float, jobs: int, ran: Sequence[Took]) -> None:
        """Enter what a sweep leaves out, in forwards and batches, and those of its batches that ran."""
        self.made_up = True
        self.forwards += forwards
        self._swept = Took(self._swept.jobs + max(0, jobs), self._swept.forwards + forwards, 0.0)
        self._ran += [t for t in ran if t.seconds > 0]

    def repeat(self, times: int, one: Cost) -> None:
        """Enter repetitions of something, given the cost of one."""
        self.made_up = True
        self.forwards += times * one.forwards
        self.backwards += times * one.backwards
        self._repeated += times * one.seconds


def prices(ran: Sequence[Took], plain: Took | None) -> tuple[float, float]:
    """Return the seconds that a batch takes whatever its size, and those of each forward in it.

    They fit all batches that ran, by relative errors, with neither below zero; a forward in a batch takes no longer
    than one in a plain batch.
    """
    rows = [(t.jobs / t.seconds, t.forwards / t.seconds) for t in [*ran, *([plain] if plain else [])]]
    if not ran:
        return 0.0, 0.0
    jj, jf, ff = (sum(r[a] * r[b] for r in rows) for a, b in ((0, 0), (0, 1), (1, 1)))
    j, f = sum(r[0] for r in rows), sum(r[1] for r in rows)
    most = plain.seconds / plain.forwards if plain else f / ff
    det = jj * ff - jf * jf
    forward = (jj * f - jf * j) / det if det > 1e-9 * jj * ff else f / ff
    forward = min(max(0.0, forward), most)
    job = (j - jf * forward) / jj
    return (job, forward) if job >= 0 else (0.0, min(f / ff, most))


_PLANNED: ContextVar[Planned | None] = ContextVar("cutaway_planned", default=None)


def planned() -> Planned | None:
    """Return what the dry run around has planned; None if work is to be done."""
    return _PLANNED.get()


@contextmanager
def planning(plain: Took | None = None, position: float = 0.0) -> Iterator[Planned]:
    """Within the block, work that repeats is planned and not done.

    `plain` is what a plain forward of many prompts took, and `position` how many bytes its activations took for each
    prompt and position.
    """
    found = Planned(plain, position)
    token = _PLANNED.set(found)
    try:
        yield found
    finally:
        _PLANNED.reset(token)


def keep(size: int) -> None:
    """Enter bytes that a dry run would hold if it did all of its work."""
    if (dry := planned()) is not None:
        dry.kept = max(dry.kept, size)


def settle() -> None:
    """Wait until an accelerator has done what it was given, so that times are those of the work."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def some(items: Sequence[T], least: int = 2) -> Iterator[T]:
    """Yield the items of a loop; in a dry run the first few, the others counted as the last of these."""
    dry = planned()
    if dry is None or len(items) <= least:
        yield from items
        return
    last = Cost()
    for item in items[:least]:
        before = (dry.forwards, dry.backwards, dry.seconds)
        with counting() as spent:
            yield item
            settle()
        left = (dry.forwards - before[0], dry.backwards - before[1], dry.seconds - before[2])
        last = Cost(spent.forwards + left[0], spent.backwards + left[1], spent.seconds + left[2])
    dry.repeat(len(items) - least, last)


def made_up(values: Tensor, done: Tensor) -> Tensor:
    """Return values [variant batch *metric] in which those that are not `done` are others', a little smaller.

    A column of zeros and ones keeps them.
    """
    pool, missing, g = values[done], ~done, generator(0)
    pick = torch.randint(len(pool), (int(missing.sum()),), generator=g).to(values.device)
    shrunk = 1 - 0.05 * torch.rand(len(pick), *values.shape[2:], generator=g).to(values)
    flags = ((pool == 0) | (pool == 1)).all(0)
    out = values.clone()
    out[missing] = torch.where(flags, pool[pick], pool[pick] * shrunk)
    return out
