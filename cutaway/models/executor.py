"""The executor: many edited variants of the same prompts as one plan.

Variants are grouped by the first layer they touch. Below it the blocks become pass-through and the clean residual
stream is injected, so masks, rotary positions, norms and head stay transformers' own; only each prompt's last token
is unembedded; rows are batched to a budget, which is halved when memory runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models import taps
from cutaway.models.anatomy import Anatomy
from cutaway.models.edits import Edit
from cutaway.models.frame import FRAME, Frame
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

Variant = Sequence[Edit]
Metric = Callable[[Float[Tensor, "row token"], Int[Tensor, "row"]], Float[Tensor, "row"]]
_BUDGET = 1 << 16  # activations' columns (rows × positions) in one batch, if nothing else is said


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
    largest number of rows × positions run at once.

    Raises:
        Refused: an edit that cannot be made, or a single row that does not fit in memory.
    """
    if not variants:
        return torch.empty(0, len(tokens))
    first = [_first_layer(model, v) for v in variants]
    clean = _clean_streams(model, tokens, set(first))
    out = torch.empty(len(variants), len(tokens), device=model.device)
    rows, done = max(1, (budget or _BUDGET) // tokens.ids.shape[1] // len(tokens)), 0
    for layer in sorted(set(first)):
        waiting = [i for i, at in enumerate(first) if at == layer]
        while waiting:
            chunk = waiting[:rows]
            try:
                out[chunk] = _run(model, tokens, [variants[i] for i in chunk], layer, clean, metric)
            except Refused as refusal:
                if "memory" not in refusal.why or rows == 1:
                    raise
                rows = max(1, rows // 2)
                continue
            waiting, done = waiting[rows:], done + len(chunk)
            if progress is not None:
                progress(done, len(variants))
    return out


def _first_layer(model: Model, variant: Variant) -> int:
    """The first block that must run again; everything before it is the clean run's."""
    layers = [_entry(model, e.where) for e in variant]
    return min(layers) if layers else 0


def _entry(model: Model, a: Address) -> int:
    if a.layer is not None:
        return a.layer
    return 0 if a.site in ("embed", "pos_embed") else model.shape.n_layers - 1


def _clean_streams(model: Model, tokens: Tokens, layers: set[int]) -> dict[int, Tensor]:
    wanted = sorted(i for i in layers if i > 0)
    if not wanted:
        return {}
    acts = model.capture(tokens, [f"resid_pre.{i}" for i in wanted], logits=False)
    return {i: acts[f"resid_pre.{i}"] for i in wanted}


def _run(
    model: Model, tokens: Tokens, variants: Sequence[Variant], layer: int, clean: dict[int, Tensor], metric: Metric
) -> Tensor:
    n, many = len(tokens), tokens.rows(list(range(len(tokens))) * len(variants))
    sees: dict[Address, Callable[[Tensor], Tensor]] = {}
    for place in {e.where.place for v in variants for e in v}:
        model.places([place])
        sees[place] = _see(tokens, [[e for e in v if e.where.place == place] for v in variants])
    share = 1.0 - layer / model.shape.n_layers
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(model.edited())
        if layer > 0:
            stack.enter_context(resumed(model.body, layer, clean[layer].repeat(len(variants), 1, 1)))
        stack.enter_context(taps.attached(model.body, sees))
        logits = model.last_logits(many, share)
    prompt = torch.arange(n, device=logits.device).repeat(len(variants))
    return metric(logits, prompt).reshape(len(variants), n)


def _see(tokens: Tokens, edits: Sequence[Sequence[Edit]]) -> Callable[[Tensor], Tensor]:
    """Each variant's edits on its own rows, in the frame of the original prompts."""
    n = len(tokens)

    def see(x: Tensor) -> Tensor:
        frame = FRAME.set(Frame(tokens, n, tokens.ids.shape[1]))
        try:
            parts = list(x.split(n))
            for i, chain in enumerate(edits):
                for e in chain:
                    parts[i] = e.apply(parts[i])
            return torch.cat(parts)
        finally:
            FRAME.reset(frame)

    return see


@contextmanager
def resumed(body: Anatomy, layer: int, stream: Float[Tensor, "row position d_model"]) -> Iterator[None]:
    """While open, a forward starts at block `layer` with `stream` entering it; earlier blocks pass through."""
    skipped = body.blocks[:layer]
    before = [b.__dict__.get("forward") for b in skipped]

    def skip(hidden_states: Tensor, *args: Any, **kw: Any) -> Any:
        return (hidden_states, None) if body.blocks_return_tuples else hidden_states

    def inject(module: nn.Module, args: Any, kw: Any) -> Any:
        return ((stream, *args[1:]), kw) if args else (args, {**kw, "hidden_states": stream})

    handle = body.blocks[layer].register_forward_pre_hook(inject, with_kwargs=True, prepend=True)
    for b in skipped:
        b.__dict__["forward"] = skip
    try:
        yield
    finally:
        handle.remove()
        for b, forward in zip(skipped, before, strict=True):
            if forward is None:
                del b.__dict__["forward"]
            else:
                b.__dict__["forward"] = forward
