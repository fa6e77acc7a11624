"""Taps: where each site's tensor passes in the live modules, and the one function that attaches to it.

A port says on which module and on which side a site is found, how to read it in its canonical shape, and how to write
it back. `attached` installs hooks for the asked ports only, removes them all whatever happens, and refuses if a
forward ran and a tap did not fire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.core.sites import SITES
from cutaway.models import attention
from cutaway.models.anatomy import Anatomy
from cutaway.models.frame import FRAME

Side = Literal["in", "in_place", "out", "dispatch"]
See = Callable[[Tensor], Tensor]  # canonical tensor -> the same object, or its replacement


@dataclass(frozen=True)
class Port:
    """How one site is reached. `read(x, y)` and `write(new, x, y)` get the module's input and output tensors (y is
    None on the input sides). `derived` reads are computed, not viewed: they cost time only when asked for."""

    module: nn.Module
    side: Side
    read: Callable[[Tensor, Any], Tensor]
    write: Callable[[Tensor, Tensor, Any], Tensor]
    derived: bool = False


_ORDER = {row.name: n for n, row in enumerate(SITES)}


def _same(x: Tensor, y: Any) -> Tensor:
    return x


def _output(x: Tensor, y: Any) -> Tensor:
    return y


def _new(new: Tensor, x: Tensor, y: Any) -> Tensor:
    return new


def port(body: Anatomy, address: Address) -> Port | None:
    """The port of a site at a layer, or None where this model has no such place."""
    name, i = address.site, address.layer
    if i is None:
        return _model_port(body, name)
    block, s = body.blocks[i], body.shape
    match name:
        case "resid_pre":
            return Port(block, "in", _same, _new)
        case "resid_post":
            return Port(block, "out", _output, _new)
        case "resid_mid":
            if body.family.post_norm:
                return _flat(Port(body.part(i, "mlp") or block, "in", _same, _new))
            module = body.resid_mid_reader(i)
            return _flat(Port(module, "in_place", _same, _new)) if module is not None else None
        case "attn_in" | "mlp_in":
            module = body.part(i, name.split("_")[0])
            return _flat(Port(module, "in", _same, _new)) if module is not None else None
        case "q" | "k" | "v" | "scores" | "pattern":
            module = body.part(i, "attn")
            return _attention_port(module, name, s.n_heads, s.n_kv_heads) if module is not None else None
        case "z":
            return _heads_in(body.part(i, "o"), s.n_heads)
        case "head_out":
            return _head_out(body.part(i, "o"), s.n_heads)
        case "attn_out":
            return _contribution(body, body.part(i, "ln1_post") or body.part(i, "o"))
        case "mlp_out":
            return _contribution(body, body.part(i, "ln2_post") or body.part(i, "down") or body.part(i, "mlp"))
        case "mlp_pre" | "mlp_gate":
            module = body.part(i, "up" if name == "mlp_pre" else "gate")
            if module is None or isinstance(module, nn.ModuleList) or (body.part(i, "down") is None):
                return None
            return (
                _half(module, 1 if name == "mlp_pre" else 0)
                if body.family.fused_gate
                else _flat(Port(module, "out", _output, _new))
            )
        case "mlp_post":
            module = body.part(i, "down")
            return _flat(Port(module, "in", _same, _new)) if module is not None else None
        case "router":
            module = body.part(i, "router")
            return _router(module) if module is not None and body.part(i, "down") is None else None
        case "ln1.scale" | "ln2.scale":
            module = body.part(i, name.split(".")[0])
            return _scale(body, module) if module is not None else None
    return None


def _model_port(body: Anatomy, name: str) -> Port | None:
    pos, final = body.top("pos"), body.top("final")
    match name:
        case "embed":
            # Without position embeddings the first block reads the embedding after all of the family's own scaling.
            module = body.top("embed")
            if pos is not None and module is not None:
                return Port(module, "out", _output, _new)
            return Port(body.blocks[0], "in", _same, _new)
        case "pos_embed":
            return (
                Port(pos, "out", lambda x, y: y.expand(_batch(y), -1, -1), _new, derived=True)
                if pos is not None
                else None
            )
        case "final.scale":
            return _scale(body, final) if final is not None else None
        case "logits":
            return Port(body.hf, "out", _output, _new) if body.unembed is not None else None
    return None


def _batch(x: Tensor) -> int:
    frame = FRAME.get()
    return frame.batch if frame is not None else x.shape[0]


def _flat(p: Port) -> Port:
    """Modules that run on [batch · position, width] (OPT's MLP) are seen as [batch, position, width]."""

    def read(x: Tensor, y: Any) -> Tensor:
        t = p.read(x, y)
        return t if t.ndim == 3 else t.view(_batch(t), -1, t.shape[-1])

    def write(new: Tensor, x: Tensor, y: Any) -> Tensor:
        old = p.read(x, y)
        return p.write(new if new.ndim == old.ndim else new.reshape(old.shape), x, y)

    return Port(p.module, p.side, read, write, p.derived)


def _contribution(body: Anatomy, module: nn.Module | None) -> Port | None:
    """What a module's output adds to the residual stream, the family's multiplier included."""
    if module is None:
        return None
    m = body.multiplier
    if m == 1.0:
        return _flat(Port(module, "out", _output, _new))
    return Port(module, "out", lambda x, y: y * m, lambda new, x, y: new / m, derived=True)


def _heads_in(module: nn.Module | None, heads: int) -> Port | None:
    if module is None:
        return None
    return Port(module, "in", lambda x, y: x.view(*x.shape[:2], heads, -1), lambda new, x, y: new.reshape(x.shape))


def _head_out(module: nn.Module | None, heads: int) -> Port | None:
    if module is None:
        return None

    def read(x: Tensor, y: Any) -> Tensor:
        return per_head(module, x.view(*x.shape[:2], heads, -1))

    def write(new: Tensor, x: Tensor, y: Any) -> Tensor:
        bias = getattr(module, "bias", None)
        return new.sum(2) if bias is None else new.sum(2) + bias

    return Port(module, "out", read, write, derived=True)


def per_head(module: nn.Module, z: Tensor) -> Tensor:
    """Each head's z through its rows of W_O: [batch, position, head, d_model]."""
    return z.transpose(1, 2).matmul(output_rows(module, z.shape[2])).transpose(1, 2)


def output_rows(module: nn.Module, heads: int) -> Tensor:
    """W_O as [head, d_head, d_model].

    Raises:
        Refused: the weight is quantised.
    """
    weight = module.weight
    if not weight.is_floating_point():
        raise Refused("head_out", f"W_O is stored as {weight.dtype}", "load the model unquantised")
    w = weight if hasattr(module, "nf") else weight.T
    return w.reshape(heads, -1, w.shape[-1])


def _half(module: nn.Module, which: int) -> Port:
    def read(x: Tensor, y: Any) -> Tensor:
        return y.chunk(2, dim=-1)[which]

    def write(new: Tensor, x: Tensor, y: Any) -> Tensor:
        other = y.chunk(2, dim=-1)[1 - which]
        return torch.cat([other, new] if which else [new, other], dim=-1)

    return Port(module, "out", read, write)


def _router(module: nn.Module) -> Port:
    def read(x: Tensor, y: Any) -> Tensor:
        return y.view(_batch(y), -1, y.shape[-1])

    return Port(module, "out", read, lambda new, x, y: new.reshape(y.shape))


def _scale(body: Anatomy, module: nn.Module) -> Port:
    def read(x: Tensor, y: Any) -> Tensor:
        t = x if x.ndim == 3 else x.view(_batch(x), -1, x.shape[-1])
        return body.norm(module).scale(t)

    def write(new: Tensor, x: Tensor, y: Any) -> Tensor:
        norm = body.norm(module)
        factor = (norm.scale(x) / new.reshape(x.shape[:-1])).unsqueeze(-1)
        return (norm.bias + (y.float() - norm.bias) * factor).to(y.dtype)

    return Port(module, "out", read, write, derived=True)


def _attention_port(module: nn.Module, name: str, heads: int, kv_heads: int) -> Port:
    if name in ("scores", "pattern"):
        return Port(module, "dispatch", _same, _new)
    group = heads // kv_heads

    def read(x: Tensor, y: Any) -> Tensor:
        x = x[:, ::group] if name != "q" and x.shape[1] != kv_heads else x
        return x.transpose(1, 2)

    def write(new: Tensor, x: Tensor, y: Any) -> Tensor:
        new = new.transpose(1, 2)
        return new.repeat_interleave(group, dim=1) if name != "q" and x.shape[1] != kv_heads else new

    # Families that repeat keys for their query heads (Falcon) make the read a selection, not a view of all of it.
    return Port(module, "dispatch", read, write)


class Fired:
    """Which taps have fired, and whether any forward has run to its end."""

    def __init__(self, wanted: Mapping[Address, Any]):
        self.silent = set(wanted)
        self.forwards = 0

    def check(self) -> None:
        """Refuse if a forward ran and a tap was silent."""
        if self.forwards and self.silent:
            names = ", ".join(sorted(map(str, self.silent)))
            raise Refused(
                f"tap at {names}", "the forward ran and never passed there", "see model.sites() for what this model has"
            )


@contextmanager
def attached(body: Anatomy, sees: Mapping[Address, See], gradient: bool = False) -> Iterator[Fired]:
    """Attach one function to each place (a site and layer) while open.

    `gradient` puts views and derived reads on the computation's path, so that gradients reach them.

    Raises:
        Refused: a place this model does not have, or a tap that did not fire in a forward.
    """
    fired = Fired(sees)
    if not sees:
        yield fired
        return
    sides: dict[tuple[nn.Module, Side], list[tuple[Address, Port, See]]] = {}
    for place, see in sorted(sees.items(), key=lambda item: _ORDER[item[0].site]):  # head_out before attn_out
        p = port(body, place)
        if p is None:
            raise Refused(f"site {place}", f"a {body.family.name} model has no such place", "see model.sites()")
        sides.setdefault((p.module, p.side), []).append((place, p, see))
    with ExitStack() as stack:
        for (module, side), entries in sides.items():
            _attach(stack, module, side, entries, fired, gradient)

        def ran(*_: Any) -> None:
            fired.forwards += 1

        stack.callback(body.hf.register_forward_hook(ran).remove)
        yield fired
        fired.check()


def _attach(stack: ExitStack, module: nn.Module, side: Side, entries: list[Any], fired: Fired, gradient: bool) -> None:
    if side == "dispatch":
        by_site = {place.site: (place, p, see) for place, p, see in entries}

        def watch(site: str, raw: Tensor) -> Tensor:
            place, p, see = by_site[site]
            return _pass(place, p, see, raw, None, fired, gradient)[0]

        stack.enter_context(attention.watching(module, frozenset(by_site), watch))
        return

    def before(m: nn.Module, args: Any, kw: Any) -> Any:
        x = start = args[0] if args else kw["hidden_states"]
        for place, p, see in entries:
            x, _ = _pass(place, p, see, x, None, fired, gradient)
        if x is start:
            return None
        if side == "in_place":
            start.copy_(x)  # the same object is the residual branch: both readers see the edit
            return None
        return ((x, *args[1:]), kw) if args else (args, {**kw, "hidden_states": x})

    def after(m: nn.Module, args: Any, kw: Any, out: Any) -> Any:
        x = args[0] if args else kw.get("hidden_states", kw.get("input_ids"))
        y = start = _tensor(out)
        for place, p, see in entries:
            _, y = _pass(place, p, see, x, y, fired, gradient)
        return None if y is start else _with_tensor(out, y)

    if side == "out":
        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
    else:
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)


def _pass(place: Address, p: Port, see: See, x: Tensor, y: Any, fired: Fired, gradient: bool) -> tuple[Tensor, Any]:
    """Show one canonical tensor to its function; returns the input and output tensors to go on with."""
    fired.silent.discard(place)
    value = p.read(x, y)
    new = see(value)
    raw = y if p.side == "out" else x
    if new is value and not (gradient and value is not raw):
        return x, y
    written = p.write(new, x, y)
    return (x, written) if p.side == "out" else (written, y)


def _tensor(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out
    return out["logits"] if hasattr(out, "keys") else out[0]


def _with_tensor(out: Any, y: Tensor) -> Any:
    if isinstance(out, Tensor):
        return y
    if hasattr(out, "keys"):
        return type(out)(**{**out, "logits": y})
    return type(out)((y, *out[1:])) if type(out) is not tuple else (y, *out[1:])
