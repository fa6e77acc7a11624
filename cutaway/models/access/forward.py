"""The one forward: a batch of tokens through the user's own model, which is left as it was."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cutaway.core.address import Address
from cutaway.core.finite import notice
from cutaway.core.out_of_memory import raising_out_of_memory
from cutaway.core.record import count
from cutaway.core.refuse import Code, Refused
from cutaway.models.access import continuations, taps
from cutaway.models.access.positions import FRAME, ForwardFrame
from cutaway.models.anatomy import rope
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.anatomy.linear import has_bias
from cutaway.models.tokens import Side, Tokens

PADDING: dict[Side, str] = {
    "left": "padding.left",
    "right": "padding.right",
}  # names under which the self-check can disable them
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def all_logits(anatomy: Anatomy, t: Tokens) -> Float[Tensor, "batch position token"]:
    """Return the logits at every position, or the last hidden state of a model without unembedding."""
    logits = _call(anatomy, t, len(t))
    notice(logits, t.mask)
    return logits


def last_logits(anatomy: Anatomy, t: Tokens, share: float = 1.0) -> Float[Tensor, "batch token"]:
    """Return the logits at each prompt's last real token; only those are unembedded, unless the logits themselves are
    tapped.

    `share` is the part of the model that really runs, for the count of forwards.
    """
    return _logits_at(anatomy, t, t.last[:, None], share)[:, 0]


def next_logits(anatomy: Anatomy, t: Tokens, share: float = 1.0) -> Float[Tensor, "batch step token"]:
    """Return the logits in front of every token of continuations: after each prompt's last token, and from there on."""
    return _logits_at(anatomy, t, t.predicting, share)


def _logits_at(
    anatomy: Anatomy, t: Tokens, columns: Int[Tensor, "batch step"], share: float
) -> Float[Tensor, "batch step token"]:
    if anatomy.unembed is None:
        raise Refused("logits", "this model has no unembedding", "capture its residual stream instead")
    # An encoder's head does more than unembed, so its rows are chosen afterwards.
    early = anatomy.family.causal and not taps.tapped(anatomy, Address("logits"))
    with _unembedding(anatomy.unembed, columns) if early else nullcontext():
        logits = _call(anatomy, t, len(t) * share)
    if not early:
        logits = logits[torch.arange(len(t), device=logits.device)[:, None], columns.to(logits.device)]
    notice(logits)
    return logits


class Enough(Exception):
    """Raised by a tap when nothing further of the running forward is needed; `streams` ends it there."""


def streams(anatomy: Anatomy, t: Tokens, share: float, whole: float = 1.0) -> None:
    """Run a forward for its taps: only the last position is unembedded, and `Enough` ends it early.

    `share` is the part of the model that runs until then, and `whole` the part that runs otherwise, for the count of
    forwards.
    """
    try:
        if anatomy.unembed is None:
            _call(anatomy, t, len(t) * whole)
        else:
            last_logits(anatomy, t, whole)
    except Enough:
        count(forwards=len(t) * share)


@contextmanager
def alone(hf: nn.Module) -> Iterator[None]:
    """Within the block, other threads wait: hooks belong to the module, so they would run under this thread's edits."""
    with _LOCKS.get(hf) or _LOCKS.setdefault(hf, threading.RLock()):
        yield


@contextmanager
def evaluating(anatomy: Anatomy) -> Iterator[None]:
    """Dropout off, whatever mode the user's model is in; the mode of every module is restored."""
    modes = anatomy.in_training()
    for m in modes:
        m.training = False
    try:
        yield
    finally:
        for m in modes:
            m.training = True


@contextmanager
def refuse_cached_forwards(anatomy: Anatomy) -> Iterator[None]:
    """Within the block, refuse the user's own forwards over a key-value cache: they do not say where positions are."""

    def enter(module: nn.Module, args: Any, kw: Any) -> None:
        held: Any = kw.get("past_key_values")
        if held is not None and FRAME.get() is None and int(held.get_seq_length()):
            what = "an edit at positions, in your own forward over a key-value cache"
            raise Refused(
                what,
                "it does not say where the prompts' positions are",
                Code("use model.generate, or no cache"),
            )

    handle = anatomy.hf.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def rooted(anatomy: Anatomy) -> Iterator[None]:
    """Make the embeddings require gradients, so that a graph exists even in a frozen model."""

    def root(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out if out.requires_grad else out.detach().requires_grad_(True)

    modules = [m for n in ("embed", "pos") if (m := anatomy.top(n)) is not None]
    handles = [m.register_forward_hook(root, prepend=True) for m in modules]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def _call(anatomy: Anatomy, t: Tokens, cost: float) -> Tensor:
    check_padding(anatomy, t)
    rope.check(anatomy, t)
    takes, kw = parameters(type(anatomy.hf)), dict[str, Any]()
    if t.padded or t.tails:
        kw["attention_mask"] = t.mask.long()
        if "position_ids" in takes:
            kw["position_ids"] = t.position_ids
    if "use_cache" in takes:
        kw["use_cache"] = False
    frame = FRAME.set(ForwardFrame(t, len(t), t.ids.shape[1]))
    try:
        with (
            raising_out_of_memory(f"a batch of {len(t)} × {t.ids.shape[1]} tokens"),
            continuations.apart(anatomy, t, "position_ids" in takes),
        ):
            out = anatomy.hf(t.ids, **kw)
    finally:
        FRAME.reset(frame)
    count(forwards=cost)
    return out.logits if getattr(out, "logits", None) is not None else out[0]


def check_padding(anatomy: Anatomy, t: Tokens) -> None:
    """Refuse padding that would run into the prompts.

    State-space layers zero what padding holds, but the bias of an input projection comes after that: their convolution
    would read it at the first tokens of a prompt padded on the left.
    """
    if t.padded and (why := anatomy.disabled.get(PADDING[t.side])):
        other = next((s for s, name in PADDING.items() if s != t.side and name not in anatomy.disabled), "")
        instead = f"pad on the {other}, or run" if other else "run"
        raise Refused(
            f"padding on the {t.side} in {anatomy.family.name}", why, f"{instead} prompts of one length at a time"
        )
    ins = anatomy.part(0, "ssm_in")
    if has_bias(ins) and not bool(t.mask[:, 0].all()):
        why = "its layers' input projections have a bias, which their convolutions would read from the padding"
        raise Refused(
            f"padding on the left in {anatomy.family.name}", why, "pad on the right, or run one prompt at a time"
        )


@contextmanager
def _unembedding(head: nn.Module, columns: Int[Tensor, "batch step"]) -> Iterator[None]:
    """Give the unembedding only some columns of each prompt."""
    rows = torch.arange(len(columns))[:, None]

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        return (x[rows.to(x.device), columns.to(x.device)], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@cache
def parameters(kind: type) -> frozenset[str]:
    """Return the names of the arguments of a class's forward."""
    return frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]
