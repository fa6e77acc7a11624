"""The executor: many edited variants of the same prompts as one plan.

What a variant does not change is not computed again. Variants run from the first layer they touch, with the clean
residual stream injected there; from the first position they touch, over the clean keys and values of the positions
before; variants of different layers join one growing batch as their layers are reached; the last block computes only
each prompt's last position beyond its keys and values; and only that position is unembedded. Prompts of one length run
together where that is cheaper (`plan`). Masks, rotary positions, norms and head stay transformers' own. Prompts and
variants are batched to a memory budget, both halved when memory runs out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.finite import finite, notice
from cutaway.core.out_of_memory import in_halves
from cutaway.core.progress import advance
from cutaway.core.record import Cost, count, counting
from cutaway.core.refuse import Keyword, OutOfMemory, Refused
from cutaway.models.access import taps
from cutaway.models.access.reading import Measure, OfLogits, Seen, measure_of
from cutaway.models.anatomy.unembedding import UNEMBEDDED, unembedding
from cutaway.models.dry import Planned, Took, made_up, planned, settle
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edit import expand_edits, of_prompts
from cutaway.models.model import Model
from cutaway.models.moments import Moments
from cutaway.models.sweep import processes as shards
from cutaway.models.sweep.cache import Ledger, ledger_folder, sweep_key
from cutaway.models.sweep.merge_edits import Added, defer, layers_added
from cutaway.models.sweep.partial_forward import Clean, clean_run, grow, restart
from cutaway.models.sweep.plan import (
    Job,
    Variant,
    bytes_of,
    can_grow,
    cost,
    first_layer,
    forwards,
    groups,
    halved,
    logit_rows,
    plan,
    reaching,
    room,
    running,
    share,
)
from cutaway.models.tokens import Tokens

Metric = Measure | OfLogits


def sweep(
    model: Model,
    tokens: Tokens,
    variants: Sequence[Variant],
    metric: Metric,
    *,
    base: Variant = (),
    budget: int | None = None,
    resume: Path | None = None,
) -> Float[Tensor, "variant batch *metric"]:
    """Measure every prompt under every variant's edits.

    `base` holds edits made in every variant, before its own: their run takes the place of the clean one, so that what
    a variant does not change in it is not computed again either.
    `metric` gets the last logits of a batch of rows and, for each row, the index of its prompt, in any order and
    number; it returns one number per row, or one row of several. A `Measure` gets what it reads instead, and forwards
    end at the deepest place that is read. `budget` is the largest number of rows × positions run
    at once (but one prompt always fits it). With `resume`, what is done is kept in that file, also when interrupted,
    and taken from it the next time. Reports progress to `core.progress` listeners. In a process group the plan
    is shared, and every process returns everything and counts the forwards of all.

    Raises:
        Refused: an edit that cannot be made, a prompt that does not fit in memory, another sweep's file, or numbers
            that are none.
    """
    if not variants:
        return torch.empty(0, len(tokens), device=model.device)
    shared = shards.processes() > 1 and not shards.split(model.hf)
    if (resume or ledger_folder()) and shards.processes() > 1:
        raise Refused(
            Keyword("resume", str(resume or ledger_folder())), "several processes share this sweep", "resume with one"
        )
    base, variants = expand_edits(base, variants)
    _check(model, tokens, [base, *variants])
    measure = measure_of(metric)
    if measure.reads.early and (reach := _reaching(model, variants, measure)) is not None:
        each, index = reach
        return sweep(model, tokens, each, metric, base=base, budget=budget, resume=resume)[index]
    if Address("logits") in measure.reads.places:  # at every position, so that batches are smaller
        budget = min(room(model, tokens.ids.shape[1], budget), logit_rows(model))
    if measure.reads.continuations:
        width, read = tokens.ids.shape[1], tokens.predicting.shape[1]
        budget = min(room(model, width, budget), logit_rows(model) * width // read)
    ledger = Ledger.open(
        len(variants), len(tokens), resume, lambda: sweep_key(model, tokens, [base, *variants], metric)
    )
    dry = planned()
    if dry is not None:
        ledger.path = None  # made-up values are not kept
    work = _Work(model, tokens, base, variants, measure, ledger, budget)
    with finite(f"a sweep of {model.name}", model.dtype), counting() as spent:
        try:
            found = groups(model, tokens, variants, budget, base)
            for prompts in found if dry is None else _sample(work, found, dry):
                own = _Group(work, prompts).share() if shared else None
                in_halves(
                    prompts.rows, len(prompts), lambda rows, p=prompts, own=own: _Group(work, p.select(rows), own).run()
                )
        finally:
            ledger.write()
        if ledger.values is not None:
            notice(ledger.values)  # those of an earlier run are not of these forwards
    if shared:
        count(forwards=shards.others(spent.forwards, model.device))
    return shards.gathered(ledger.values, model.device, shared)


def _reaching(model: Model, variants: Sequence[Variant], measure: Measure) -> tuple[list[Variant], list[int]] | None:
    """Return the different variants that are left without edits behind what is read, and for each variant which of
    them it is; None if all edits count."""
    left = reaching(model, variants, measure.reads)
    if all(len(a) == len(b) for a, b in zip(left, variants, strict=True)):
        return None
    empty = [[]] if any(not v for v in left) else []
    each = [*(v for v in left if v), *empty]
    order = iter(range(len(each)))
    return each, [next(order) if v else len(each) - 1 for v in left]


def _check(model: Model, tokens: Tokens, variants: Sequence[Variant]) -> None:
    """Refuse places that are not there, in any prompt, before anything runs."""
    edits = [e for v in variants for e in v]
    model.places([e.where for e in edits])
    if tokens.padded or tokens.tails:
        for p in dict.fromkeys(p for e in edits for p in e.places() if p is not None):
            tokens.column(p)


@dataclass(frozen=True)
class SweepPart:
    """Some of the prompts of a long sweep: the same variants in the same order, with these prompts' own values."""

    tokens: Tokens
    variants: Sequence[Variant]
    metric: Metric
    base: Variant = ()


def streamed(model: Model, parts: Iterable[SweepPart], *, budget: int | None = None) -> Moments:
    """Running moments over all prompts of every variant's metric, a part at a time.

    A part is swept, taken into the moments and forgotten before the next is asked for, so that memory depends on
    neither the number of prompts nor their activations. One dimension a variant (and metric, which varies fastest).

    Raises:
        Refused: no parts, parts of different plans, or what `sweep` refuses.
    """
    total: Moments | None = None
    for part in parts:
        values = sweep(model, part.tokens, part.variants, part.metric, base=part.base, budget=budget)
        rows = values.movedim(1, 0).flatten(1)
        total = (total or Moments(rows.shape[1])).update(rows)
    if total is None:
        raise Refused("a sweep over no parts", "there are no prompts", "give at least one part")
    return total


@dataclass(frozen=True)
class _Work:
    """A sweep with its state of completion."""

    model: Model
    tokens: Tokens
    base: Variant
    variants: Sequence[Variant]
    measure: Measure
    ledger: Ledger
    budget: int | None


def _sample(work: _Work, prompts: Sequence[BatchSlice], dry: Planned) -> Sequence[BatchSlice]:
    """Plan a sweep and run a few variants of its largest group, make up the other values; return what is left to run.

    That is nothing, or everything of a sweep that is done with so few.
    """
    planned_groups = [(g, g.jobs()) for g in (_Group(work, p) for p in prompts)]
    group, jobs = max(planned_groups, key=lambda found: found[0].forwards(found[1]))
    asked = [i for j in jobs for i in j.variants]
    few = dry.few(asked, group.tokens.ids.numel())
    if len(few) == len(asked):
        return prompts
    whole, all_jobs = sum(g.forwards(found) for g, found in planned_groups), sum(len(j) for _, j in planned_groups)
    ran = list[Took]()
    with counting() as spent:
        for variants in (few[:: len(few) - 1], few[1:-1]):  # a small one and a larger one
            if variants:
                sampled = _Group(work, group.prompts, frozenset(variants))
                n, took = len(sampled.jobs()), sampled.run()
                ran.append(Took(n, took.forwards, took.seconds))
    dry.sweep(whole - spent.forwards, all_jobs - sum(t.jobs for t in ran), ran)
    logits = min(group.room, len(asked) * len(group.prompts)) * 4 * work.model.shape.d_vocab
    for g, found in planned_groups:
        sizes = [bytes_of(work.model, g.tokens, j, dry.position) for j in found]
        dry.batch = max([dry.batch, *(size + 2 * logits for size in sizes)])
    ledger = work.ledger
    assert ledger.values is not None
    ledger.values = made_up(ledger.values, ledger.done.to(ledger.values.device))
    return ()


class _Group:
    """Prompts of a sweep that run together; with `own`, only these variants are run."""

    def __init__(self, work: _Work, prompts: BatchSlice, own: frozenset[int] | None = None):
        self.model, self.prompts, self.own, self.budget = work.model, prompts, own, work.budget
        self.measure, self.reads, self.ledger = work.measure, work.measure.reads, work.ledger
        self.tokens = work.tokens if prompts.everything else prompts.tokens(work.tokens)
        self.base = of_prompts(work.base, prompts)
        variants = [of_prompts(v, prompts) for v in work.variants]
        first, self.added = [first_layer(self.model, v) for v in variants], Added()
        if not taps.busy(self.model.anatomy) and not self.reads.places:
            both = [defer(self.model, self.base, v, f, self.added) for v, f in zip(variants, first, strict=True)]
            variants, first = [v for v, _ in both], [f for _, f in both]
        able = can_grow(self.model, self.tokens, self.reads)
        self.variants = [running(self.model, self.base, v, f, able) for v, f in zip(variants, first, strict=True)]
        self.first = first
        self.room = logit_rows(self.model)
        self.way = unembedding(self.model.anatomy) if self.reads.last_logits else None
        self.waiting: list[tuple[Job, Tensor]] = []  # final streams, until enough share one unembedding

    def share(self) -> frozenset[int]:
        """Return the variants that this process runs, of those not done."""
        jobs = shards.mine(self.jobs(), lambda j: cost(self.model, self.tokens, self.first, j))
        return frozenset(i for j in jobs for i in j.variants)

    def forwards(self, jobs: Sequence[Job]) -> float:
        """Return the forwards of some jobs, and of the run that they start from."""
        if not jobs:
            return 0.0
        whole = any(j.start > 0 for j in jobs)
        clean = len(self.prompts) * (1.0 if whole else share(self.model, self.reads))
        return clean + sum(forwards(self.model, self.tokens, self.first, j, self.reads) for j in jobs)

    def jobs(self) -> list[Job]:
        """Plan the jobs that are not done yet."""
        done = self.ledger.done[:, list(self.prompts.rows)].all(1)
        if self.own is not None:
            done[[i for i in range(len(done)) if i not in self.own]] = True
        return plan(
            self.model, self.tokens, self.variants, self.first, self.budget, done.tolist(), self.reads, self.base
        )

    def run(self) -> Cost:
        """Do what is not done yet; return what its jobs took."""
        model, todo = self.model, self.jobs()
        if not todo:
            return Cost()
        needed = [i for j in todo for i in j.variants]
        with model.edited(*self.base), torch.no_grad():
            layers = sorted({self.first[i] for i in needed})
            written = layers_added([self.variants[i] for i in needed])
            clean = clean_run(model, self.tokens, layers, any(j.start > 0 for j in todo), written, self.reads)
            self.added.values = clean.added
        if planned() is not None:
            settle()
        with counting() as spent:
            try:
                with model.edited(), torch.no_grad():
                    self._work(todo, clean)
            finally:
                self._flush()
            if planned() is not None:
                settle()
        return spent

    def _work(self, todo: list[Job], clean: Clean) -> None:
        while todo:
            job = todo.pop(0)
            chosen = [self.variants[i] for i in job.variants]
            try:
                if job.grows:
                    at = [self.first[i] for i in job.variants]
                    alone = not self.reads.places and self.way is not None and not self.way.after
                    shared = alone and UNEMBEDDED not in self.model.disabled
                    seen = grow(self.model, self.tokens, chosen, at, job.start, clean, job.narrow, shared, self.reads)
                    if not shared or seen.last_logits is None:
                        self._enter(job.variants, seen)
                        continue
                    self.waiting.append((job, seen.last_logits))
                    if sum(len(x) for _, x in self.waiting) >= self.room:
                        self._flush()
                else:
                    self._enter(job.variants, restart(self.model, self.tokens, chosen, job.low, clean, self.reads))
            except OutOfMemory:
                if len(job.variants) == 1:
                    raise
                todo = [*halved(job), *todo]

    def _flush(self) -> None:
        """Unembed what waits."""
        if not self.waiting or self.way is None:
            return
        n, variants = len(self.prompts), [i for job, _ in self.waiting for i in job.variants]
        streams = torch.cat([x for _, x in self.waiting])
        self.waiting, size = [], max(1, self.room // n)
        for at in range(0, len(variants), size):
            part = streams[at * n : (at + size) * n]
            self._enter(variants[at : at + size], self.way.seen(part, self.measure.columns))

    def _enter(self, variants: Sequence[int], seen: Seen) -> None:
        """Measure what was seen of some variants, and enter it in the ledger."""
        device = seen.last_logits.device if seen.last_logits is not None else self.tokens.ids.device
        prompt = torch.tensor(self.prompts.rows, device=device).repeat(len(variants))
        values = self.measure(seen, prompt)
        rows = values.reshape(len(variants), len(self.prompts), *values.shape[1:])
        self.ledger.put(variants, self.prompts.rows, rows)
        advance(float(self.ledger.done.sum()), self.ledger.done.numel())
