"""The executor: many edited variants of the same prompts as one plan.

What a variant does not change is not computed again. Variants run from the first layer they touch, with the clean
residual stream injected there; from the first position they touch, over the clean keys and values of the positions
before; variants of different layers join one growing batch as their layers are reached; the last block computes only
each prompt's last position beyond its keys and values; and only that position is unembedded. Masks, rotary positions,
norms and head stay transformers' own. Rows are batched to a memory budget, halved when memory runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.sites import BY_NAME
from cutaway.models import taps
from cutaway.models.edits import Edit, Knockout
from cutaway.models.model import Model
from cutaway.models.resume import clean_run, grow, restart, unembed
from cutaway.models.tokens import Tokens

Variant = Sequence[Edit]
Metric = Callable[[Float[Tensor, "row token"], Int[Tensor, "row"]], Float[Tensor, "row"]]
_BUDGET_BYTES = 1 << 28  # of the widest activation of one batch, if no other budget is given
PREFIX = "executor.prefix"  # the name under which the self-check can disable growing batches and key-value reuse
# Edits here, in the last layer, need more of it than the last position.
_INSIDE_LAST = {"z", "head_out", "attn_out", "resid_mid", "mlp_in", "mlp_pre", "mlp_gate", "mlp_post", "mlp_out"}
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
    budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "variant batch"]:
    """The metric of every prompt under every variant's edits.

    `metric` gets the last logits of a batch of rows and, for each row, the index of its prompt. `budget` is the
    largest number of rows × positions run at once. `progress` is told (variants done, variants in all).

    Raises:
        Refused: an edit that cannot be made, or a single variant that does not fit in memory.
    """
    if not variants:
        return torch.empty(0, len(tokens), device=model.device)
    model.places([e.where for v in variants for e in v])
    first = [_first_layer(model, v) for v in variants]
    todo = plan(model, tokens, variants, first, budget or _budget(model, tokens))
    pending = _Pending(model, tokens, metric, len(variants), progress)
    with model.edited(), torch.no_grad():
        clean = clean_run(model, tokens, sorted(set(first)), keys=any(j.start > 0 for j in todo))
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
        pending.flush()
    return pending.out


class _Pending:
    """Results on their way: final streams wait until enough of them share one reading of the unembedding."""

    def __init__(
        self, model: Model, tokens: Tokens, metric: Metric, n: int, progress: Callable[[int, int], None] | None
    ):
        self.model, self.n, self.metric, self.progress = model, len(tokens), metric, progress
        self.out = torch.empty(n, len(tokens), device=model.device)
        self.room = max(1, _BUDGET_BYTES // (4 * model.shape.d_vocab))
        self.waiting: list[tuple[Job, Tensor]] = []
        self.done = 0

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
        self.out[list(variants)] = self.metric(logits, prompt).reshape(len(variants), self.n).to(self.out.dtype)
        self.done += len(variants)
        if self.progress is not None:
            self.progress(self.done, len(self.out))


def plan(model: Model, tokens: Tokens, variants: Sequence[Variant], first: Sequence[int], budget: int) -> list[Job]:
    """Group variants so that each group computes the least, and cut the groups to the budget."""
    width, n = tokens.ids.shape[1], len(tokens)
    can_grow = _can_grow(model, tokens)
    groups: dict[tuple[bool, bool, int, int], list[int]] = {}
    for i, v in enumerate(variants):
        grows = can_grow and all(_grows(model, e) for e in v)
        start = min((_start(e, width) for e in v), default=0) if grows else 0
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


def _halved(job: Job) -> Iterator[Job]:
    half = len(job.variants) // 2
    return (replace(job, variants=part) for part in (job.variants[:half], job.variants[half:]))


def _budget(model: Model, tokens: Tokens) -> int:
    s = model.shape
    widest = max(s.d_mlp, 4 * s.d_model, s.n_heads * tokens.ids.shape[1])
    return max(tokens.ids.numel(), _BUDGET_BYTES // (4 * widest))


def _first_layer(model: Model, variant: Variant) -> int:
    """The first block that must run again; everything before it is the clean run's."""
    return min((_entry(model, e) for e in variant), default=0)


def _entry(model: Model, e: Edit) -> int:
    a = e.where
    if a.layer is not None:
        return a.layer
    return 0 if a.site in ("embed", "pos_embed") else model.shape.n_layers - 1


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
    if isinstance(e, Knockout) or not BY_NAME[e.where.site].has_position:
        return 0
    places = [0 if p is None else p if p >= 0 else width + p for p in e.places()]
    return max(0, min(places, default=0))


def _needs_last_block(model: Model, e: Edit) -> bool:
    site, layer = e.where.site, e.where.layer
    last = layer in (None, model.shape.n_layers - 1)
    return last and site in _INSIDE_LAST | _AFTER_LAST
