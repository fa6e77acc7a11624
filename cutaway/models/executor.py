"""The executor: many edited variants of the same prompts as one plan.

What a variant does not change is not computed again. Variants run from the first layer they touch, with the clean
residual stream injected there; from the first position they touch, over the clean keys and values of the positions
before; variants of different layers join one growing batch as their layers are reached; the last block computes only
each prompt's last position beyond its keys and values; and only that position is unembedded. Masks, rotary positions,
norms and head stay transformers' own. Rows are batched to a memory budget, halved when memory runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.progress import advance
from cutaway.core.refuse import Refused
from cutaway.core.sites import BY_NAME
from cutaway.models import shards, taps
from cutaway.models.carry import Added, carry, layers_added
from cutaway.models.edits import Edit, Knockout, laid_out
from cutaway.models.ledger import Ledger, kept, opened, sweep_key
from cutaway.models.model import Model
from cutaway.models.moments import Moments
from cutaway.models.resume import Clean, clean_run, grow, restart, unembed
from cutaway.models.tokens import Tokens

Variant = Sequence[Edit]
Metric = Callable[[Float[Tensor, "row token"], Int[Tensor, "row"]], Float[Tensor, "row *metric"]]
_BUDGET_BYTES = 1 << 28  # of the widest activation of one batch, if no other budget is given
PREFIX = "executor.prefix"  # the name under which the self-check can disable growing batches and key-value reuse
_ENTERING = ("embed", "pos_embed", "resid_pre")  # edits here are in the stream that enters their layer
# Edits here, in the last layer, need more of it than the last position.
_INSIDE_LAST = {"z", "head_out", "attn_out", "resid_mid", "mlp_in", "mlp_pre", "mlp_gate", "mlp_post", "mlp_out",
                "ssm.post", "ssm.out"}  # fmt: skip
_AFTER_LAST = {"resid_post", "ln2.scale", "final.scale"}


@dataclass(frozen=True)
class Job:
    """Variants that run in one batch: from `start` on (columns), from layer `low` on, growing or restarted."""

    variants: tuple[int, ...]
    low: int
    start: int
    grows: bool
    narrow: bool


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
    """The metric of every prompt under every variant's edits.

    `base` holds edits made in every variant, before its own: their run takes the place of the clean one, so that what
    a variant does not change in it is not computed again either.
    `metric` gets the last logits of a batch of rows and, for each row, the index of its prompt; it returns one number
    a row, or one row of several. `budget` is the largest number of rows × positions run at once. With `resume`, what
    is done is kept in that file, also when interrupted, and taken from it the next time. Progress is told to whoever
    listens (`core.progress`). In a process group the plan is shared, and every process returns everything.

    Raises:
        Refused: an edit that cannot be made, a variant that does not fit in memory, or another sweep's file.
    """
    if not variants:
        return torch.empty(0, len(tokens), device=model.device)
    shared = shards.processes() > 1 and not shards.split(model.hf)
    if (resume or kept()) and shards.processes() > 1:
        raise Refused(f"resume={str(resume or kept())!r}", "several processes share this sweep", "resume with one")
    base, variants = laid_out(base, variants)
    model.places([e.where for v in variants for e in v])
    ledger = opened(len(variants), resume, lambda: sweep_key(model, tokens, [base, *variants], metric))
    first = [_first_layer(model, v) for v in variants]
    able, added = _can_grow(model, tokens), Added()
    if not taps.busy(model.body):
        both = [carry(model, base, v, f, added) for v, f in zip(variants, first, strict=True)]
        variants, first = [v for v, _ in both], [f for _, f in both]
    variants = [_running(model, base, v, f, able) for v, f in zip(variants, first, strict=True)]
    todo = plan(model, tokens, variants, first, budget or _budget(model, tokens), ledger.done.tolist())
    todo = shards.mine(todo, lambda j: _cost(model, tokens, first, j)) if shared else todo
    pending = _Pending(model, tokens, metric, ledger)
    try:
        if todo:
            layers = sorted({first[i] for j in todo for i in j.variants})
            with model.edited(*base), torch.no_grad():
                needed = [variants[i] for j in todo for i in j.variants]
                clean = clean_run(model, tokens, layers, any(j.start > 0 for j in todo), layers_added(needed))
                added.values = clean.added
            with model.edited(), torch.no_grad():
                _work(model, tokens, variants, first, todo, clean, pending)
    finally:
        pending.flush()
        ledger.write()
    return shards.gathered(ledger.values, model.device, shared)


@dataclass(frozen=True)
class Part:
    """Some of the prompts of a long sweep: the same variants in the same order, with these prompts' own values."""

    tokens: Tokens
    variants: Sequence[Variant]
    metric: Metric
    base: Variant = ()


def streamed(model: Model, parts: Iterable[Part], *, budget: int | None = None) -> Moments:
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


def _work(
    model: Model,
    tokens: Tokens,
    variants: Sequence[Variant],
    first: Sequence[int],
    todo: list[Job],
    clean: Clean,
    pending: _Pending,
) -> None:
    while todo:
        job = todo.pop(0)
        chosen = [variants[i] for i in job.variants]
        try:
            if job.grows:
                at = [first[i] for i in job.variants]
                pending.streams(job, grow(model, tokens, chosen, at, job.start, clean, job.narrow))
            else:
                pending.logits(job.variants, restart(model, tokens, chosen, job.low, clean))
        except Refused as refusal:
            if "memory" not in refusal.why or len(job.variants) == 1:
                raise
            todo = [*_halved(job), *todo]


class _Pending:
    """Results on their way: final streams wait until enough of them share one reading of the unembedding."""

    def __init__(self, model: Model, tokens: Tokens, metric: Metric, ledger: Ledger):
        self.model, self.n, self.metric, self.ledger = model, len(tokens), metric, ledger
        self.room = max(1, _BUDGET_BYTES // (4 * model.shape.d_vocab))
        self.waiting: list[tuple[Job, Tensor]] = []

    def streams(self, job: Job, x: Float[Tensor, "row d_model"]) -> None:
        """Final streams of a job's variants."""
        self.waiting.append((job, x))
        if sum(len(x) for _, x in self.waiting) >= self.room:
            self.flush()

    def flush(self) -> None:
        """Unembed what waits."""
        if self.waiting:
            variants = [i for job, _ in self.waiting for i in job.variants]
            streams = torch.cat([x for _, x in self.waiting])
            size = max(1, self.room // self.n)
            for at in range(0, len(variants), size):
                part = streams[at * self.n : (at + size) * self.n]
                self.logits(variants[at : at + size], unembed(self.model.body, part))
            self.waiting = []

    def logits(self, variants: Sequence[int], logits: Float[Tensor, "row token"]) -> None:
        """Last logits of some variants."""
        prompt = torch.arange(self.n, device=logits.device).repeat(len(variants))
        values = self.metric(logits, prompt)
        self.ledger.put(variants, values.reshape(len(variants), self.n, *values.shape[1:]))
        advance(float(self.ledger.done.sum()), len(self.ledger.done))


def plan(
    model: Model,
    tokens: Tokens,
    variants: Sequence[Variant],
    first: Sequence[int],
    budget: int,
    done: Sequence[bool] = (),
) -> list[Job]:
    """Group the variants not done yet so that each group computes the least, and cut the groups to the budget."""
    width, n = tokens.ids.shape[1], len(tokens)
    can_grow = _can_grow(model, tokens)
    groups: dict[tuple[bool, bool, int, int], list[int]] = {}
    for i, v in enumerate(variants):
        if done and done[i]:
            continue
        grows = can_grow and all(_grows(model, e) for e in v)
        start = min((_start(e, width) for e in v), default=0) if grows and not model.family.ssm else 0
        narrow = grows and not any(_needs_last_block(model, e) for e in v)
        groups.setdefault((grows, narrow, start, -1 if grows else first[i]), []).append(i)
    jobs = []
    for (grows, narrow, start, _), members in groups.items():
        members.sort(key=lambda i: first[i])
        size = max(1, budget // max(1, width - start) // n)
        for at in range(0, len(members), size):
            part = tuple(members[at : at + size])
            jobs.append(Job(part, first[part[0]], start, grows, narrow))
    return jobs


def _cost(model: Model, tokens: Tokens, first: Sequence[int], job: Job) -> float:
    """What a job costs, in columns through a block."""
    return sum(model.shape.n_layers - first[i] for i in job.variants) * (tokens.ids.shape[1] - job.start)


def _halved(job: Job) -> Iterator[Job]:
    half = len(job.variants) // 2
    return (replace(job, variants=part) for part in (job.variants[:half], job.variants[half:]))


def _budget(model: Model, tokens: Tokens) -> int:
    return max(tokens.ids.numel(), _BUDGET_BYTES // (4 * model.body.widest(tokens.ids.shape[1])))


def _first_layer(model: Model, variant: Variant) -> int:
    """The first block that must run again; everything before it is the clean run's."""
    return min((_entry(model, e) for e in variant), default=0)


def _entry(model: Model, e: Edit) -> int:
    a = e.where
    if a.layer is not None:
        return a.layer
    return 0 if a.site in ("embed", "pos_embed") else model.shape.n_layers - 1


def _running(model: Model, base: Variant, variant: Variant, first: int, able: bool) -> Variant:
    """A variant's edits after those of the base that the injected stream does not hold already."""
    edits = [*(b for b in base if (_entry(model, b), b.where.site not in _ENTERING) > (first, False)), *variant]
    injected = first > 0 or (able and all(_grows(model, e) for e in edits))
    return edits if injected else [*base, *variant]


def _can_grow(model: Model, tokens: Tokens) -> bool:
    """Growing batches need prompts of one length, causal attention, and no other edits around."""
    family = model.family
    able = family.causal and not family.fixed_batch and PREFIX not in model.disabled
    return able and not tokens.padded and not taps.busy(model.body)


def _grows(model: Model, e: Edit) -> bool:
    return e.where.site != "logits" and not (
        e.where.site in ("embed", "pos_embed") and model.body.top("pos") is not None
    )


def _start(e: Edit, width: int) -> int:
    """The first column an edit touches."""
    if not isinstance(e, Knockout) and not BY_NAME[e.where.site].has_position:
        return 0
    touched = e.queries if isinstance(e, Knockout) else e.places()  # cut edges change what their queries read
    places = [0 if p is None else p if p >= 0 else width + p for p in touched]
    return max(0, min(places, default=0))


def _needs_last_block(model: Model, e: Edit) -> bool:
    site, layer = e.where.site, e.where.layer
    last = layer in (None, model.shape.n_layers - 1)
    return last and site in _INSIDE_LAST | _AFTER_LAST
