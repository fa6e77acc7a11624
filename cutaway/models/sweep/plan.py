"""The plan of a sweep: which prompts run together, and which variants of them in which batches.

Prompts of one length need no padding, and then variants can start at their own layer and position; but every group of
prompts has its own batches, and a batch has a price of its own. `groups` weighs the two: prompts by length, or all
together in their padding. `plan` then groups variants so that each group computes the least. Both keep to a budget of
rows × positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cutaway.core.sites import BY_NAME
from cutaway.models.access import taps
from cutaway.models.access.capture import Collector
from cutaway.models.access.forward import PADDING
from cutaway.models.access.reading import Reads, depth
from cutaway.models.anatomy import rope
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.keep import Read
from cutaway.models.edits.library import Knockout
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

Variant = Sequence[Edit]
PREFIX = "executor.prefix"  # the name under which the self-check can disable growing batches and key-value reuse
RESUME = "executor.resume"  # the same for leaving out the blocks before the first that a variant changes
_BUDGET_BYTES = 1 << 28  # of the widest activation of one batch
_LOGIT_BYTES = 1 << 28  # of the logits that are read at once
_BUDGET_CPU = 1 << 13  # rows × positions, beyond which a processor's batches are no quicker
# What calling a block costs, whatever the batch, in multiplications that the device would do in that time.
_CALL = {"cpu": 3e7, "cuda": 1.5e10}
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


def groups(
    model: Model, tokens: Tokens, variants: Sequence[Variant], budget: int | None, base: Variant = ()
) -> list[BatchSlice]:
    """Which prompts run together: all, or those of one length; and never more than fit the budget.

    Edits that may read across prompts keep all of them together, whatever the budget.
    """
    apart = tokens.by_length().values()
    whole = [BatchSlice.of(tokens, range(len(tokens)), False)]
    if any(e.whole_batch for v in (base, *variants) for e in v):
        return whole
    found = [_within(model, p, budget) for p in whole]
    sides = rope.apart(model.anatomy, tokens)
    if len(sides) > 1:
        found = [_within(model, BatchSlice.of(tokens, rows, True), budget) for rows in sides]
    if len(apart) > 1 and all(e.local for v in variants for e in v):
        by_length = [_within(model, BatchSlice.of(tokens, rows, True), budget) for rows in apart]
        apart_only = PADDING[tokens.side] in model.disabled
        if apart_only or _price(model, tokens, variants, by_length, budget) < _price(
            model, tokens, variants, found, budget
        ):
            found = by_length
    return [p for parts in found for p in parts]


def plan(
    model: Model,
    tokens: Tokens,
    variants: Sequence[Variant],
    first: Sequence[int],
    budget: int | None,
    done: Sequence[bool] = (),
    reads: Reads = Reads(),  # noqa: B008 (frozen)
    base: Variant = (),
) -> list[Job]:
    """Group the variants not done yet so that each group computes the least, and cut the groups to the budget.

    Variants may hold edits of the `base`. What these do in front of a variant's own is in the run that it starts from.
    """
    width, n, layers = tokens.ids.shape[1], len(tokens), model.shape.n_layers
    end = int(tokens.last.max()) + 1 if tokens.tails else width  # of the prompts
    able, budget = can_grow(model, tokens, reads), room(model, width, budget)
    whole_end = any(depth(a, layers) >= layers - 1 for a in reads.places)  # more of the last block is read than its end
    held = {id(e) for e in base if _resumes(e)}
    alike: dict[tuple[bool, bool, int, int], list[int]] = {}
    for i, v in enumerate(variants):
        if done and done[i]:
            continue
        grows_ = able and all(grows(model, e) for e in v)
        own = [e for e in v if id(e) not in held]
        start = min((_start(e, end) for e in own), default=0) if grows_ and not model.family.ssm else 0
        narrow = grows_ and not whole_end and not any(_needs_last_block(model, e) for e in v)
        alike.setdefault((grows_, narrow, start, -1 if grows_ else first[i]), []).append(i)
    jobs = []
    for (grows_, narrow, start, _), members in alike.items():
        members.sort(key=lambda i: first[i])
        rows = budget // max(1, width - start)
        if start:  # attention reads keys and values of all columns at once
            s = model.shape
            rows = min(rows, max(1, _BUDGET_BYTES // max(1, 8 * width * max(s.n_heads, s.n_kv_heads) * s.d_head)))
        size = max(1, rows // n)
        for at in range(0, len(members), size):
            part = tuple(members[at : at + size])
            jobs.append(Job(part, first[part[0]], start, grows_, narrow))
    return jobs


def reaching(model: Model, variants: Sequence[Variant], reads: Reads) -> list[Variant]:
    """Leave out the edits behind the deepest place that is read, which change nothing there."""
    layers = model.shape.n_layers
    deepest = reads.deepest(layers)
    return [[e for e in v if depth(e.where, layers) <= deepest] for v in variants]


def halved(job: Job) -> Iterator[Job]:
    """Return the job as two, of half as many variants."""
    half = len(job.variants) // 2
    return (replace(job, variants=part) for part in (job.variants[:half], job.variants[half:]))


def room(model: Model, width: int, budget: int | None = None) -> int:
    """Return the rows × positions that one batch may have, for prompts of some width."""
    if budget is None:
        budget = _BUDGET_BYTES // (4 * model.anatomy.widest(width))
        budget = min(budget, _BUDGET_CPU) if model.device.type == "cpu" else budget
    return max(width, budget)


def logit_rows(model: Model) -> int:
    """Return how many rows' logits are read at once."""
    return max(1, _LOGIT_BYTES // (4 * model.shape.d_vocab))


def cost(model: Model, tokens: Tokens, first: Sequence[int], job: Job) -> float:
    """Return the cost of a job, in columns through a block."""
    layers = sum(model.shape.n_layers - (first[i] if job.grows else job.low) for i in job.variants)
    return layers * len(tokens) * (tokens.ids.shape[1] - job.start)


def forwards(model: Model, tokens: Tokens, first: Sequence[int], job: Job, reads: Reads) -> float:
    """Return the forwards that a job counts, in prompts through the whole model."""
    layers, width, low = model.shape.n_layers, tokens.ids.shape[1], first[job.variants[0]] if job.grows else job.low
    deepest = share(model, reads.since(low, layers)) * layers if reads.early else layers
    deepest = round(deepest) if job.grows else deepest
    blocks = sum(max(0, deepest - (first[i] if job.grows else job.low)) for i in job.variants)
    return blocks * len(tokens) * (width - job.start) / (layers * width)


def share(model: Model, reads: Reads) -> float:
    """Return the part of the model that a forward runs until it has everything that is read."""
    return Collector(model.anatomy, reads.places, live=True, stops=True).share if reads.early else 1.0


def bytes_of(model: Model, tokens: Tokens, job: Job, position: float) -> int:
    """Return about how much memory a job's batch takes, of which each row and position takes `position` bytes.

    Where it starts behind the first column, the keys and values before are laid out for every row of one layer.
    """
    s, width, rows = model.shape, tokens.ids.shape[1], len(job.variants) * len(tokens)
    keys = 2 * max(s.n_heads, s.n_kv_heads) * s.d_head * (width if job.start else 0) * model.dtype.itemsize
    return round(rows * ((width - job.start) * position + keys))


def first_layer(model: Model, variant: Variant) -> int:
    """Return the first block that must run again; everything before it is the clean run's."""
    if RESUME in model.disabled:
        return 0
    return min((_entry(model, e) for e in variant), default=0)


def running(model: Model, base: Variant, variant: Variant, first: int, able: bool) -> Variant:
    """Return a variant's edits after those of the base that the injected stream does not hold already."""
    edits = [*(b for b in base if (_entry(model, b), b.where.site not in _ENTERING) > (first, False)), *variant]
    injected = first > 0 or (able and all(grows(model, e) for e in edits))
    return edits if injected else [*base, *variant]


def can_grow(model: Model, tokens: Tokens, reads: Reads = Reads()) -> bool:  # noqa: B008 (frozen)
    """Return True if batches may grow: of prompts of one length, with causal attention and no other edits around, and
    if no embedding is read, of which a growing batch has one row."""
    if any(depth(a, model.shape.n_layers) < 0 for a in reads.places):
        return False
    family = model.family
    able = family.causal and not family.fixed_batch and not {PREFIX, RESUME} & model.disabled.keys()
    return able and not tokens.padded and len(set(tokens.tails)) <= 1 and not taps.busy(model.anatomy)


def grows(model: Model, e: Edit) -> bool:
    """Return True if a variant with this edit may join a growing batch."""
    return e.where.site != "logits" and not (
        e.where.site in ("embed", "pos_embed") and model.anatomy.top("pos") is not None
    )


def _within(model: Model, whole: BatchSlice, budget: int | None) -> list[BatchSlice]:
    """Return the prompts of one batch as parts that fit the budget, of nearly equal size."""
    most = max(1, room(model, whole.width, budget) // whole.width)
    parts = -(-len(whole) // most)
    edges = [len(whole) * i // parts for i in range(parts + 1)]
    return [whole.select(whole.rows[a:z]) for a, z in pairwise(edges)]


def _price(
    model: Model, tokens: Tokens, variants: Sequence[Variant], parts: Sequence[Sequence[BatchSlice]], budget: int | None
) -> float:
    """About what the sweep of prompts grouped so costs, in multiplications; `parts` of one group are alike."""
    block = sum(p.numel() for p in model.anatomy.blocks[0].parameters())
    call, layers = _CALL.get(model.device.type, _CALL["cuda"]), model.shape.n_layers
    first, total = [first_layer(model, v) for v in variants], 0.0
    for alike in parts:
        some = alike[0].tokens(tokens)
        jobs = plan(model, some, variants, first, budget)
        columns = sum(cost(model, some, first, j) for j in jobs) + some.ids.numel() * layers
        calls = sum(layers - j.low for j in jobs) + layers
        total += len(alike) * (columns * block + calls * call)
    return total


def _entry(model: Model, e: Edit) -> int:
    a = e.where
    if a.layer is not None:
        return a.layer
    return 0 if a.site in ("embed", "pos_embed") else model.shape.n_layers - 1


def _start(e: Edit, width: int) -> int:
    """Return the first column an edit touches, of prompts of some width."""
    if not isinstance(e, Knockout) and not BY_NAME[e.where.site].has_position:
        return 0
    touched = e.queries if isinstance(e, Knockout) else e.places()  # cut edges change what their queries read
    places = [e.since if p is None else p if p >= 0 else width + p for p in touched]
    return max(0, min([width - 1, *places])) if places else 0


def _resumes(e: Edit) -> bool:
    """Return True if an edit that is made from the first column on can also be made from any later one on."""
    return e.placed and not isinstance(e, Read) and (isinstance(e, Knockout) or BY_NAME[e.where.site].has_position)


def _needs_last_block(model: Model, e: Edit) -> bool:
    site, layer = e.where.site, e.where.layer
    last = layer in (None, model.shape.n_layers - 1)
    return last and site in _INSIDE_LAST | _AFTER_LAST
