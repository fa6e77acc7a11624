"""Taps inside state-space layers: what the convolution, the step sizes, the states and the scan make of a prompt.

transformers computes these in functions that a layer's forward calls by name, so that hooks on its `conv1d` or
`dt_proj` never fire. While a layer is watched those names lead through wrappers, in which the layer's watchers see and
replace what goes in and comes out; other layers and other models go straight through, and the scan stays the model's
own. Only the states, which no scan hands out, are computed here, and only when asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cutaway.models.access import attention
from cutaway.models.access.positions import real

SITES = frozenset({"ssm.conv", "ssm.dt", "ssm.B", "ssm.C", "ssm.state", "ssm.y"})
_RUNNING: ContextVar[tuple[nn.Module, int] | None] = ContextVar("cutaway_ssm", default=None)  # layer, positions
_INSTALLED: dict[int, dict[str, Any]] = {}  # id of a namespace -> what its names led to, and how many layers watch


def watching(
    watchers: Mapping[nn.Module, tuple[frozenset[str], attention.Watcher]],
) -> AbstractContextManager[None]:
    """While open, each state-space layer's watcher gets its `ssm.*` tensors, [batch, position, …]."""
    return attention.watching(watchers, _open, _close)


def _open(module: nn.Module) -> None:
    names = _namespace(type(module))
    kept = _INSTALLED.setdefault(id(names), {"count": 0, "originals": {}})
    if kept["count"] == 0:
        kept["originals"] = {n: names[n] for n in _HANDLERS if n in names}
        names.update({n: _dispatcher(n, own) for n, own in kept["originals"].items()})
    kept["count"] += 1
    attention.wrap(module, _running(module, module.forward))


def _close(module: nn.Module) -> None:
    attention.unwrap(module)
    names = _namespace(type(module))
    kept = _INSTALLED[id(names)]
    kept["count"] -= 1
    if kept["count"] == 0:
        names.update(kept["originals"])
        del _INSTALLED[id(names)]


@cache
def _namespace(kind: type) -> dict[str, Any]:
    """Return the globals in which a layer's forward looks up names."""
    return inspect.unwrap(kind.forward).__globals__  # type: ignore[attr-defined]


def _running(module: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, **kw: Any) -> Any:
        token = _RUNNING.set((module, hidden_states.shape[1]))
        try:
            return plain(hidden_states, *args, **kw)
        finally:
            _RUNNING.reset(token)

    return forward


def _dispatcher(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kw: Any) -> Any:
        running = _RUNNING.get()
        if running is None or not attention.is_watched(running[0]):
            return original(*args, **kw)
        return _HANDLERS[name](_Layer(*running), original, *args, **kw)

    return call


@dataclass(frozen=True)
class _Layer:
    """A running layer, as its watchers see it."""

    module: nn.Module
    positions: int

    def shown(self, site: str, x: Tensor, back: Callable[[Tensor], Tensor], raw: Any) -> Any:
        """`raw`, or what `back` makes of the replacement of its readable form `x`; gradients pass through `x`."""
        if not attention.wants(self.module, site):
            return raw
        new = attention.seen(self.module, site, x)
        return raw if new is x and not torch.is_grad_enabled() else back(new)

    def step_size(
        self, dt: Tensor, kw: dict[str, Any], bias: Tensor | None, back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Δ [batch position ssm_head] from its argument; if it is replaced, the call's own softplus is turned off."""
        size = dt if bias is None else dt + bias.to(dt.dtype)
        size = functional.softplus(size) if kw.get("dt_softplus", kw.get("delta_softplus")) else size
        if "dt_limit" in kw:
            size = size.clamp(*kw["dt_limit"])
        new = self.shown("ssm.dt", size, lambda x: x, None)
        if new is not None:
            names = ("delta_bias", "delta_softplus") if "delta_softplus" in kw else ("dt_bias", "dt_softplus")
            kw |= {names[0]: None, names[1]: False, "dt": back(new)}
            kw |= {"dt_limit": (-float("inf"), float("inf"))} if "dt_limit" in kw else {}
        return size if new is None else new


# --- the functions that layers call


def _convolve(layer: _Layer, original: Callable[..., Any], *args: Any, **kw: Any) -> Tensor:
    """[batch channel column] → the same; in the second generation B and C are convolved behind x."""
    y = original(*args, **kw)
    width, columns = int(layer.module.intermediate_size), slice(y.shape[-1] - layer.positions, None)  # type: ignore[arg-type]

    def back(new: Tensor) -> Tensor:
        whole = y.clone()
        whole[:, :width, columns] = new.transpose(1, 2)
        return whole

    return layer.shown("ssm.conv", y[:, :width, columns].transpose(1, 2), back, y)


def _scan_channels(
    layer: _Layer,
    original: Callable[..., Any],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor,
    **kw: Any,
) -> Any:
    """Run the scan of Mamba 1: x and dt [batch channel position], B and C [batch state position]; z is the gate."""
    bias = kw.get("delta_bias")
    size = layer.step_size(dt.transpose(1, 2), kw, bias, lambda new: new.transpose(1, 2))
    B, C = (
        layer.shown(f"ssm.{n}", t.transpose(1, 2)[:, :, None], lambda new: new[:, :, 0].transpose(1, 2), t)
        for n, t in (("B", B), ("C", C))
    )
    if not attention.wants(layer.module, "ssm.state", "ssm.y"):
        return original(x, kw.pop("dt", dt), A, B, C, D=D, z=z, **kw)
    out = original(x, kw.pop("dt", dt), A, B, C, D=D, z=None, **kw)
    y, last = out if isinstance(out, tuple) else (out, None)
    u, write, read = x.transpose(1, 2), B.transpose(1, 2)[:, :, None], C.transpose(1, 2)[:, :, None]

    def recurrence() -> _Recurrence:
        drive = size[..., None] * write.float() * u[..., None].float()
        return _Recurrence(torch.exp(A * size[..., None]), drive, read, u * D, None)

    y, state = _through(layer, y.transpose(1, 2), recurrence)
    gated = layer.shown("ssm.y", y, lambda new: new, y).transpose(1, 2) * functional.silu(z)
    return gated if last is None else (gated, last if state is None else state.to(last.dtype))


def _scan_heads(
    layer: _Layer, original: Callable[..., Any], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kw: Any
) -> Any:
    """Run the scan of Mamba 2: x [batch position head width], dt [batch position head], B and C [… group state]."""
    bias, first, wide = kw.get("dt_bias"), kw.get("initial_states"), x.shape[3]
    size = layer.step_size(dt, kw, bias, lambda new: new)
    B, C = (layer.shown(f"ssm.{n}", t, lambda new: new, t) for n, t in (("B", B), ("C", C)))
    out = original(x, kw.pop("dt", dt), A, B, C, **kw)
    y, last = out if isinstance(out, tuple) else (out, None)

    def recurrence() -> _Recurrence:
        heads = x.shape[2] // B.shape[2]
        write, read = (t.float().repeat_interleave(heads, 2)[:, :, :, None] for t in (B, C))
        drive = (x.float() * size[..., None].float())[..., None] * write
        decay = torch.exp(A * size.float())[..., None, None].expand(*x.shape, 1)
        skip = x * kw["D"][:, None]
        start = first.flatten(1, 2) if first is not None else None
        decay, drive, read, skip = (t.flatten(2, 3) for t in (decay, drive, read.expand(*x.shape, -1), skip))
        return _Recurrence(decay, drive, read, skip, start)

    flat, state = _through(layer, y.flatten(2), recurrence)
    y = layer.shown("ssm.y", flat, lambda new: new, flat).unflatten(2, (-1, wide))
    return y if last is None else (y, last if state is None else state.reshape(last.shape).to(last.dtype))


def _step_channels(
    layer: _Layer,
    original: Callable[..., Any],
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    z: Tensor,
    **kw: Any,
) -> Tensor:
    """Run one position of Mamba 1: x and dt [batch channel], B and C [batch state]."""
    layer.step_size(dt[:, None], kw, kw.get("dt_bias"), lambda new: new[:, 0])
    B, C = (layer.shown(f"ssm.{n}", t[:, None, None], lambda new: new[:, 0, 0], t) for n, t in (("B", B), ("C", C)))
    if not attention.wants(layer.module, "ssm.state", "ssm.y"):
        return original(state, x, kw.pop("dt", dt), A, B, C, D, z=z, **kw)
    y = original(state, x, kw.pop("dt", dt), A, B, C, D, z=None, **kw)
    y = _stepped(layer, state, y, C[:, None])
    return layer.shown("ssm.y", y[:, None], lambda new: new[:, 0], y) * functional.silu(z)


def _step_heads(
    layer: _Layer,
    original: Callable[..., Any],
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    **kw: Any,
) -> Tensor:
    """Run one position of Mamba 2: x and dt [batch head width], B and C [batch group state]."""
    bias, (heads, wide) = kw.get("dt_bias"), x.shape[1:]
    bias = bias[:, 0] if bias is not None else None
    layer.step_size(dt[:, None, :, 0], kw, bias, lambda new: new[:, 0, :, None].expand(x.shape))
    B, C = (layer.shown(f"ssm.{n}", t[:, None], lambda new: new[:, 0], t) for n, t in (("B", B), ("C", C)))
    y = original(state, x, kw.pop("dt", dt), A, B, C, D, **kw)
    read = C.repeat_interleave(heads // C.shape[1], 1).repeat_interleave(wide, 1)
    y = _stepped(layer, state, y.flatten(1), read)
    return layer.shown("ssm.y", y[:, None], lambda new: new[:, 0], y).unflatten(1, (heads, wide))


_HANDLERS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolve,
    "causal_conv1d_update": _convolve,
    "mamba_selective_scan": _scan_channels,
    "mamba2_chunk_scan": _scan_heads,
    "mamba_selective_state_update": _step_channels,
    "mamba2_selective_state_update": _step_heads,
}


# --- states


@dataclass(frozen=True)
class _Recurrence:
    """h_t = decay_t · h_t−1 + drive_t from h_−1 = `first` (None: zero); y_t = read_t · h_t + skip_t."""

    decay: Float[Tensor, "batch position channel #state"]
    drive: Float[Tensor, "batch position channel state"]
    read: Float[Tensor, "batch position #channel state"]
    skip: Float[Tensor, "batch position channel"]
    first: Float[Tensor, "batch channel state"] | None

    def run(self, at: int, before: Tensor | None) -> Float[Tensor, "batch later channel state"]:
        """Return the states from position `at` on, after the state `before`.

        What flows back stays at its position: `summed` carries it on, so that it counts once.
        """
        h, out = before, []
        for t in range(at, self.drive.shape[1]):
            h = self.drive[:, t] if h is None else self.decay[:, t] * h.detach() + self.drive[:, t]
            out.append(h)
        return torch.stack(out, 1)

    def summed(self, h: Float[Tensor, "batch position channel state"]) -> Float[Tensor, "batch position channel state"]:
        """Return the same states, with the gradient that each has through all later ones."""
        total, out = None, []
        for t in range(h.shape[1]):
            fresh = h[:, t] if t == 0 else h[:, t] - (self.decay[:, t] * h[:, t - 1]).detach()
            total = fresh if total is None else self.decay[:, t].detach() * total + fresh
            out.append(total)
        return torch.stack(out, 1)


def _through(
    layer: _Layer, y: Float[Tensor, "batch position channel"], recurrence: Callable[[], _Recurrence]
) -> tuple[Float[Tensor, "batch position channel"], Float[Tensor, "batch channel state"] | None]:
    """Re-run the scan with edited states. Returns (output, last state), the state None if no watcher changed any."""
    sees = attention.watchers(layer.module, "ssm.state")
    if not sees:
        return y, None
    r = recurrence()
    own = r.run(0, r.first)
    new = _settled(sees, r, own)
    if new is own and not (torch.is_grad_enabled() and own.requires_grad):
        return y, None
    value = y if new is own else y + ((new - own) * r.read).sum(-1).to(y.dtype)
    if torch.is_grad_enabled():
        path = ((r.summed(new) * r.read).sum(-1) + r.skip).to(y.dtype)
        value = value.detach() + (path - path.detach())
    return value, new[:, -1]


def _settled(sees: list[Callable[[Tensor], Tensor]], r: _Recurrence, own: Tensor) -> Tensor:
    """Pass the states through every watcher, each position following from the replaced states before it.

    A watcher is shown a position again whenever an earlier one has changed, and the next watcher only what is final
    for those before it.
    """
    stages = [own, *[own] * len(sees)]
    mask, columns = real(own), own.shape[1]

    def settle(stage: int, at: int, before: Tensor | None) -> None:
        if stage == 0:
            if at > 0:
                stages[0] = torch.cat([stages[0][:, :at], r.run(at, before)], 1)
            return
        settle(stage - 1, at, before)
        while True:
            old = stages[stage - 1]
            new = sees[stage - 1](old)
            if new is not old and mask is not None:
                new = torch.where(mask[..., None, None], new, old)  # what padding holds would run into the prompt
            stages[stage] = new
            changed = (
                [] if new is old else (new[:, at:] != old[:, at:]).flatten(2).any(2).any(0).nonzero()[:, 0].tolist()
            )
            if not changed or at + changed[0] == columns - 1:
                return
            at += changed[0] + 1
            settle(stage - 1, at, new[:, at - 1])

    settle(len(sees), 0, r.first)
    return stages[-1]


def _stepped(layer: _Layer, state: Tensor, y: Float[Tensor, "batch channel"], read: Tensor) -> Tensor:
    """Apply the watchers of the state at one position, where it has been updated in place; returns the new y."""
    own = state.reshape(len(state), 1, -1, state.shape[-1]).clone()
    new = layer.shown("ssm.state", own, lambda new: new, None)
    if new is None:
        return y
    state.copy_(new.reshape(state.shape))
    return y + ((new - own)[:, 0] * read).sum(-1).to(y.dtype)
