"""Starting a forward in the middle: clean streams injected at a block, earlier blocks passing through.

Two ways of running a batch of variants. `restart` repeats the prompts for every variant and starts all rows at one
layer: it asks nothing of the family. `grow` starts each variant at its own layer and all of them at one column, over
the clean keys and values of the columns before: it needs unpadded prompts of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cutaway.core.address import Address
from cutaway.core.finite import notice
from cutaway.core.out_of_memory import raising_out_of_memory
from cutaway.core.record import count
from cutaway.models.access import continuations, forward, taps
from cutaway.models.access.capture import Activations, Collector
from cutaway.models.access.positions import FRAME, ForwardFrame
from cutaway.models.access.reading import Continued, Reads, Seen, observe
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.edits.edit import Edit
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

Variants = Sequence[Sequence[Edit]]


@dataclass
class Clean:
    """State of one run without the variants' edits.

    Attributes:
        streams: inputs of blocks, by layer.
        added: outputs of MLPs, by layer.
        keys: keys and values of every layer.
        read: the activations that the metric reads.
    """

    streams: dict[int, Float[Tensor, "batch position d_model"]] = field(default_factory=dict)
    added: dict[int, Float[Tensor, "batch position d_model"]] = field(default_factory=dict)
    keys: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    read: dict[Address, Float[Tensor, "batch ..."]] = field(default_factory=dict)


def clean_run(
    model: Model,
    tokens: Tokens,
    layers: Sequence[int],
    keys: bool,
    added: Sequence[int] = (),
    reads: Reads = Reads(),  # noqa: B008 (frozen)
) -> Clean:
    """Run the prompts once and keep the streams entering `layers`, what the MLPs of some layers `added`, the keys and
    values if asked, and the activations that a metric reads.
    """
    # All keys and values must be there, so a run that keeps them does not end early.
    clean, collector = Clean(), Collector(model.anatomy, reads.places, live=True, stops=reads.early and not keys)

    def keep(kept: dict[int, Tensor], layer: int) -> Callable[[Tensor], Tensor]:
        def see(x: Tensor) -> Tensor:
            kept[layer] = x.clone() if kept is clean.added and model.family.adds_in_place else x
            return x

        return see

    sees = {Address("resid_pre", i): keep(clean.streams, i) for i in layers}
    sees |= {Address("mlp_out", i): keep(clean.added, i) for i in added}
    with (
        taps.attached(model.anatomy, sees),
        taps.attached(model.anatomy, {a: collector.see(a) for a in collector.places}),
    ):
        clean.read = collector.found
        if not keys:
            if reads.early:
                forward.streams(model.anatomy, tokens, collector.share)
                collector.notice(tokens)
            else:
                forward.last_logits(model.anatomy, tokens)
            return clean
        from transformers import DynamicCache

        # Without the configuration a cache keeps every key, also those that a sliding window would drop.
        cache_: Any = DynamicCache()
        frame = ForwardFrame(tokens, len(tokens), tokens.ids.shape[1])
        _call(model, tokens.ids, frame, past_key_values=cache_, use_cache=True)
        count(forwards=len(tokens))
        clean.keys = [(layer.keys, layer.values) for layer in cache_.layers]
    return clean


def restart(
    model: Model,
    tokens: Tokens,
    variants: Variants,
    layer: int,
    clean: Clean,
    reads: Reads = Reads(),  # noqa: B008 (frozen)
) -> Seen:
    """Run every prompt under every variant, all rows from one layer on, and return what a metric reads of them."""
    many = tokens.rows(list(range(len(tokens))) * len(variants))
    sees = _sees(tokens, variants, ForwardFrame(tokens, len(tokens), tokens.ids.shape[1]))
    with ExitStack() as stack:
        if layer > 0:
            stack.enter_context(passing(model.anatomy, layer))
            stream = clean.streams[layer].repeat(len(variants), 1, 1)
            stack.enter_context(injecting(model.anatomy.blocks[layer], lambda x: stream))
        stack.enter_context(taps.attached(model.anatomy, sees))
        seen = observe(model.anatomy, many, reads.since(layer, model.shape.n_layers), layer)
    done = _completed(tokens, reads, seen.activations or {}, clean, len(variants), 0)
    return Seen(seen.last_logits, done, seen.continuations)


def grow(
    model: Model,
    tokens: Tokens,
    variants: Variants,
    first: Sequence[int],
    start: int,
    clean: Clean,
    narrow: bool,
    unread: bool,
    reads: Reads = Reads(),  # noqa: B008 (frozen)
) -> Seen:
    """Run every prompt under every variant, each from its own layer in `first` (ascending), and return what a metric
    reads of them.

    With `unread`, what the unembedding would read stands for the last logits: to unembed many batches at once reads
    the vocabulary's weights only once.
    """
    n, width, layers = len(tokens), tokens.ids.shape[1], model.shape.n_layers
    collector = Collector(model.anatomy, reads.since(first[0], layers).places, live=True, stops=reads.early)
    running = [sum(f <= i for f in first) for i in range(layers)]
    own = ForwardFrame(tokens, n, width - start, start)  # of one variant: the batch of `frame` grows
    frame = replace(own)
    low = first[0]
    with ExitStack() as stack:
        stack.enter_context(passing(model.anatomy, low))
        for i in range(low, layers):
            joining = running[i] - (running[i - 1] if i > low else 0)
            stream = clean.streams[i][:, start:].repeat(joining, 1, 1) if joining else None
            stack.enter_context(injecting(model.anatomy.blocks[i], _joined(stream, i == low, frame)))
        stack.enter_context(taps.attached(model.anatomy, _sees(tokens, variants, own)))
        stack.enter_context(taps.attached(model.anatomy, {a: collector.see(a) for a in collector.places}))
        read_columns = tokens.predicting.shape[1] + 1 if reads.continuations else 1
        everywhere = Address("logits") in reads.places
        stack.enter_context(
            _last_only(model.anatomy, narrow and width - start > 1 == read_columns, everywhere, read_columns)
        )
        read = stack.enter_context(held_back(model.anatomy)) if unread else []
        kw = {"past_key_values": _prefix(clean, start), "use_cache": True} if start else {"use_cache": False}
        last = logits = None
        try:
            logits = _call(model, tokens.ids[:1, start:], frame, **kw)
            last = (read[0] if unread else logits)[:, -1] if reads.last_logits else None
        except forward.Enough:
            running = running[: round(collector.share * layers)]
    count(forwards=n * sum(running) * (width - start) / (layers * width))
    more = logits[:, -read_columns:-1] if reads.continuations and logits is not None else None
    for x in [y for y in (last, more) if y is not None] or [*collector.found.values()][-1:]:
        notice(x)
    continued = None if more is None else Continued(more, tokens.rows(list(range(n)) * len(variants)))
    return Seen(last, _completed(tokens, reads, collector.found, clean, len(variants), start), continued)


def _completed(
    tokens: Tokens, reads: Reads, found: Mapping[Any, Tensor], clean: Clean, variants: int, start: int
) -> Activations | None:
    """Fill up what a batch of variants computed with the clean run's values: of the columns before `start`, and of
    the variants that join behind a place.
    """
    if not reads.places:
        return None
    n, whole = len(tokens), dict[Address, Tensor]()
    for a in reads.places:
        clean_rows, parts = clean.read[a], list[Tensor]()
        if a in found:
            x = found[a]
            if start and (axis := _column_axis(a)) is not None:
                front = clean_rows.narrow(axis, 0, start)
                x = torch.cat([front.repeat(len(x) // n, *[1] * (x.ndim - 1)), x], dim=axis)
            parts.append(x)
        missing = variants - len(parts[0]) // n if parts else variants
        parts += [clean_rows] * missing
        whole[a] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return Activations(whole, tokens.rows(list(range(n)) * variants))


def _column_axis(a: Address) -> int | None:
    """Return the axis of a place's tensor along which the columns of a forward lie."""
    axes = a.row.axes.split()
    return next((axes.index(name) for name in ("position", "q_pos") if name in axes), None)


@contextmanager
def passing(anatomy: Anatomy, layer: int) -> Iterator[None]:
    """Within the block, the layers before `layer` return their input."""
    with without(anatomy, range(layer)):
        yield


@contextmanager
def without(anatomy: Anatomy, layers: Iterable[int]) -> Iterator[None]:
    """Within the block, these layers return their input."""
    skipped = [anatomy.blocks[i] for i in layers]
    before = [b.__dict__.get("forward") for b in skipped]

    def skip(hidden_states: Tensor, *args: Any, **kw: Any) -> Any:
        return (hidden_states, None) if anatomy.blocks_return_tuples else hidden_states

    try:
        for b in skipped:
            b.__dict__["forward"] = skip
        yield
    finally:
        for b, own in zip(skipped, before, strict=True):
            if own is not None:
                b.__dict__["forward"] = own
            else:
                b.__dict__.pop("forward", None)


@contextmanager
def injecting(block: nn.Module, stream: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, what enters the block is replaced, before any tap sees it."""

    def inject(module: nn.Module, args: Any, kw: Any) -> Any:
        new = stream(args[0] if args else kw["hidden_states"])
        return ((new, *args[1:]), kw) if args else (args, {**kw, "hidden_states": new})

    handle = block.register_forward_pre_hook(inject, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _joined(stream: Tensor | None, alone: bool, frame: ForwardFrame) -> Callable[[Tensor], Tensor]:
    """Return a function that appends the rows that start here to the rows so far, and updates the frame's batch."""

    def join(x: Tensor) -> Tensor:
        x = stream if stream is not None and alone else x if stream is None else torch.cat([x, stream])
        frame.batch = len(x)
        return x

    return join


@contextmanager
def entered(model: Model, layer: int, stream: Float[Tensor, "batch position d_model"]) -> Iterator[None]:
    """Within the block, forwards of these prompts begin at a block, with the stream that entered it in another run."""
    with passing(model.anatomy, layer), injecting(model.anatomy.blocks[layer], lambda x: stream):
        yield


@contextmanager
def _last_only(anatomy: Anatomy, narrow: bool, everywhere: bool = False, columns: int = 1) -> Iterator[None]:
    """Hand the last column (or several) only to the unembedding, unless `everywhere`; if `narrow`, the last block
    writes only in the last column too.

    Its attention output and MLP see one column; adding one column to a stream of many is right at the last and
    unread elsewhere.
    """

    def last(module: nn.Module, args: Any, kw: Any) -> Any:
        x = args[0] if args else kw["hidden_states"]
        if x.ndim != 3:
            return None
        x = x[:, -columns:].contiguous()  # a strided input would send the linear map down a slow path
        return ((x, *args[1:]), kw) if args else (args, {**kw, "hidden_states": x})

    final = anatomy.shape.n_layers - 1
    modules = [
        None if everywhere else anatomy.unembed,
        *(anatomy.part(final, n) for n in ("o", "mlp", "ssm_out") if narrow),
    ]
    handles = [m.register_forward_pre_hook(last, with_kwargs=True) for m in modules if m is not None]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


@contextmanager
def held_back(anatomy: Anatomy) -> Iterator[list[Tensor]]:
    """Within the block the unembedding is skipped: it stores its input and returns one dummy token."""
    head, read = anatomy.unembed, list[Tensor]()
    assert head is not None
    before = head.__dict__.get("forward")

    def keep(x: Tensor) -> Tensor:
        read.append(x)
        return x[..., :1]

    head.__dict__["forward"] = keep
    try:
        yield read
    finally:
        if before is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = before


def _sees(tokens: Tokens, variants: Variants, frame: ForwardFrame) -> dict[Address, Callable[[Tensor], Tensor]]:
    places = dict.fromkeys(e.where.place for v in variants for e in v)
    frames = [frame.of_variant(i) for i in range(len(variants))]
    return {p: _see([[e for e in v if e.where.place == p] for v in variants], len(tokens), frames) for p in places}


def _see(chains: Variants, n: int, frames: Sequence[ForwardFrame]) -> Callable[[Tensor], Tensor]:
    """Edit each variant's rows, [prompt, …], in a frame of its own; later variants may not run yet."""
    edited = [(i, chain) for i, chain in enumerate(chains) if chain]

    def see(x: Tensor) -> Tensor:
        new = x.clone()
        for i, chain in edited:
            part = x[i * n : (i + 1) * n]
            for e in chain:
                part = e.apply(part, frames[i])
            new[i * n : (i + 1) * n] = part
        return new

    return see


def _prefix(clean: Clean, start: int) -> Any:
    """Return a cache with the clean keys and values of the first columns.

    They are laid out for the rows of a layer only when its attention asks for them, and not stored: copies for all
    layers at once would outgrow everything else.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    def held(keys: Tensor, values: Tensor) -> Any:
        layer: Any = DynamicLayer()
        layer.keys, layer.values = keys[:, :, :start], values[:, :, :start]
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True

        def update(k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return _behind(layer.keys, k), _behind(layer.values, v)

        layer.update = update
        return layer

    cache_: Any = DynamicCache()
    cache_.layers = [held(k, v) if k is not None else DynamicLayer() for k, v in clean.keys]  # None: only hands on
    return cache_


def _behind(prefix: Tensor, new: Tensor) -> Tensor:
    """`new` columns behind those of the prefix, whose prompts repeat as rows."""
    times = len(new) // len(prefix)
    rows = prefix[None].expand(times, *prefix.shape).reshape(-1, *prefix.shape[1:]) if times > 1 else prefix
    return torch.cat([rows, new], dim=-2)


def _call(model: Model, ids: Tensor, frame: ForwardFrame, **kw: Any) -> Tensor:
    t, placed = frame.tokens, "position_ids" in forward.parameters(type(model.hf))
    if placed and t is not None and t.tails:
        kw["position_ids"] = t.position_ids[:1, frame.offset : frame.offset + frame.width]
        if "past_key_values" not in kw:  # positions that begin again would be taken for several texts in one row
            kw["attention_mask"] = torch.ones_like(ids)
    elif placed:
        kw["position_ids"] = torch.arange(frame.offset, frame.offset + frame.width, device=ids.device)[None]
    token = FRAME.set(frame)
    try:
        with (
            raising_out_of_memory(f"a batch of {frame.batch} × {frame.width} tokens", "give a smaller budget"),
            continuations.apart(model.anatomy, t, placed),
        ):
            return model.hf(ids, **kw).logits
    finally:
        FRAME.reset(token)
