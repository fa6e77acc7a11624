"""Ports: where each site's tensor passes through the live modules, and how to read it and write it back there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cutaway.core.address import Address
from cutaway.models.access.positions import FRAME, real
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.anatomy.linear import affine, matrix
from cutaway.models.anatomy.norms import wide
from cutaway.models.anatomy.offload import present
from cutaway.models.anatomy.projections import Letter, projection

Side = Literal["in", "in_place", "out", "dispatch", "scan"]


@dataclass(frozen=True)
class Port:
    """Access to one site: a side of a module, with functions that read and write the site's tensor there.

    Attributes:
        module: The module that the tensor passes through.
        side: The side of the module that is hooked.
        read: Gets the module's input and output (None on the input sides) and returns the site's tensor.
        write: Gets the new tensor and the same two, and returns what the module's input or output becomes.
        derived: True if reading computes the tensor instead of viewing it, which costs time.
    """

    module: nn.Module
    side: Side
    read: Callable[[Tensor, Any], Tensor]
    write: Callable[[Tensor, Tensor, Any], Tensor]
    derived: bool = False


def _same(x: Tensor, y: Any) -> Tensor:
    return x


def _output(x: Any, y: Any) -> Tensor:
    return y


def _new(new: Tensor, x: Any, y: Any) -> Tensor:
    return new


def port(anatomy: Anatomy, address: Address) -> Port | None:
    """Return the port of a site at a layer, or None if this model does not have it."""
    return anatomy.remember((address.site, address.layer), lambda: _port(anatomy, address))


def _port(anatomy: Anatomy, address: Address) -> Port | None:
    name, i = address.site, address.layer
    if i is None:
        return _model_port(anatomy, name)
    block, s = anatomy.blocks[i], anatomy.shape
    match name:
        case "resid_pre":
            return Port(block, "in", _same, _new)
        case "resid_post":
            return Port(block, "out", _output, _new)
        case "resid_mid":
            if anatomy.family.post_norm:
                return _flat(Port(anatomy.part(i, "mlp") or block, "in_place", _same, _new))
            module = anatomy.resid_mid_reader(i)
            return _flat(Port(module, "in_place", _same, _new)) if module is not None else None
        case "attn_in" | "mlp_in":
            module = anatomy.part(i, name.split("_")[0])
            return _flat(Port(module, "in", _same, _new)) if module is not None else None
        case "q_in" | "k_in" | "v_in":
            return _branch_in(anatomy, i, name[0])  # type: ignore[arg-type]
        case "q" | "k" | "v" | "scores" | "pattern":
            module = anatomy.part(i, "attn")
            return _attention_port(module, name, s.n_heads, s.n_kv_heads) if module is not None else None
        case "z":
            return _heads_in(anatomy.part(i, "o"), s.n_heads)
        case "head_out":
            return _head_out(anatomy.part(i, "o"), s.n_heads)
        case "attn_out":
            return _contribution(anatomy, anatomy.part(i, "ln1_post") or anatomy.part(i, "o"))
        case "mlp_out":
            return _contribution(
                anatomy, anatomy.part(i, "ln2_post") or anatomy.part(i, "down") or anatomy.part(i, "mlp")
            )
        case "mlp_pre" | "mlp_gate":
            module = anatomy.part(i, "up" if name == "mlp_pre" else "gate")
            if module is None or isinstance(module, nn.ModuleList) or (anatomy.part(i, "down") is None):
                return None
            return (
                _half(module, 1 if name == "mlp_pre" else 0)
                if anatomy.family.fused_gate
                else _flat(Port(module, "out", _output, _new))
            )
        case "mlp_post":
            module = anatomy.part(i, "down")
            return _flat(Port(module, "in", _same, _new)) if module is not None else None
        case "router":
            module = anatomy.part(i, "router")
            return _router(module) if module is not None and anatomy.part(i, "down") is None else None
        case "ln1.scale" | "ln2.scale":
            module = anatomy.part(i, name.split(".")[0])
            return _scale(anatomy, module) if module is not None else None
    return _state_space_port(anatomy, name, i)


def _state_space_port(anatomy: Anatomy, name: str, i: int) -> Port | None:
    layer, ins, outs = (anatomy.part(i, n) for n in ("ssm", "ssm_in", "ssm_out"))
    if layer is None or ins is None or outs is None:
        return None
    match name:
        case "ssm.in":
            return Port(layer, "in", _same, _new)
        case "ssm.x" | "ssm.gate":
            second = (name == "ssm.gate") != anatomy.family.gate_first
            return _channels(ins, anatomy.shape.d_inner, second, keeps_padding=name == "ssm.x")
        case "ssm.conv" | "ssm.dt" | "ssm.B" | "ssm.C" | "ssm.state" | "ssm.y":
            return Port(layer, "scan", _same, _new)
        case "ssm.post":
            return Port(outs, "in", _same, _new)
        case "ssm.out":
            return _contribution(anatomy, outs)
    return None


def _model_port(anatomy: Anatomy, name: str) -> Port | None:
    pos, final = anatomy.top("pos"), anatomy.top("final")
    match name:
        case "embed":
            # Without position embeddings the first block reads the embedding after all of the family's own scaling.
            module = anatomy.top("embed")
            if pos is not None and module is not None:
                return Port(module, "out", _output, _new)
            return Port(anatomy.blocks[0], "in", _same, _new)
        case "pos_embed":
            return (
                Port(pos, "out", lambda x, y: y.expand(_batch(y), -1, -1), _new, derived=True)
                if pos is not None
                else None
            )
        case "final.scale":
            return _scale(anatomy, final) if final is not None else None
        case "logits":
            return Port(anatomy.hf, "out", _output, _new) if anatomy.unembed is not None else None
    return None


def _batch(x: Tensor) -> int:
    frame = FRAME.get()
    return frame.batch if frame is not None else x.shape[0]


def _flat(p: Port) -> Port:
    """View [batch · position, width], on which some modules run (OPT's MLP), as [batch, position, width]."""

    def read(x: Tensor, y: Any) -> Tensor:
        t = p.read(x, y)
        return t if t.ndim == 3 else t.view(_batch(t), -1, t.shape[-1])

    def write(new: Tensor, x: Tensor, y: Any) -> Tensor:
        old = p.read(x, y)
        return p.write(new if new.ndim == old.ndim else new.reshape(old.shape), x, y)

    return Port(p.module, p.side, read, write, p.derived)


def _contribution(anatomy: Anatomy, module: nn.Module | None) -> Port | None:
    """Return the port of what a module adds to the residual stream, including the family's multiplier."""
    if module is None:
        return None
    m = anatomy.multiplier
    if m == 1.0:
        return _flat(Port(module, "out", _output, _new))
    return Port(module, "out", lambda x, y: y * m, lambda new, x, y: new / m, derived=True)


def _branch_in(anatomy: Anatomy, layer: int, letter: Letter) -> Port | None:
    """Return the port of a projection's input as each head reads it: one tensor for all heads, unless an edit differs.

    The module itself reads one input for all heads. By its linearity, what a head would make of another input is its
    output plus the difference through its columns of the matrix; norms and rotations after it see the sum.
    """
    found = projection(anatomy, layer, letter)
    if found is None:
        return None
    module, columns = found
    n, flat = len(columns), columns.flatten()
    first = int(flat[0])
    # side by side they are a view of the matrix, and else a copy
    together = torch.equal(flat, torch.arange(first, first + len(flat)))

    def read(x: Tensor, y: Any) -> Tensor:
        return x.unsqueeze(2).expand(-1, -1, n, -1)

    def write(new: Tensor, x: Tensor, y: Any) -> Tensor:
        with present(module):
            w = matrix(module)
        # of a matrix that is split over processes, `narrow` fails where a slice would be shorter
        w = (w.narrow(1, first, len(flat)) if together else w[:, flat.to(w.device)]).reshape(w.shape[0], n, -1)
        change = torch.einsum("bphd,dhe->bphe", new - x.unsqueeze(2), w.to(new.dtype)).flatten(2)  # [b p (h e)]
        if together and y.shape[-1] == len(flat):
            return y + change
        out, at = y.clone(), slice(first, first + len(flat)) if together else flat.to(y.device)
        out[..., at] = y[..., at] + change
        return out

    return Port(module, "out", read, write, derived=True)


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
        with present(module):
            _, bias = affine(module)
        return new.sum(2) if bias is None else new.sum(2) + bias

    return Port(module, "out", read, write, derived=True)


def per_head(module: nn.Module, z: Tensor) -> Tensor:
    """Map each head's z through its rows of W_O to [batch, position, head, d_model]."""
    with present(module):
        return z.transpose(1, 2).matmul(output_rows(module, z.shape[2])).transpose(1, 2)


def output_rows(module: nn.Module, heads: int) -> Tensor:
    """Return W_O as [head, d_head, d_model].

    Raises:
        Refused: the output projection is not a linear map.
    """
    w = matrix(module)
    return w.reshape(heads, -1, w.shape[-1])


def _half(module: nn.Module, which: int) -> Port:
    def read(x: Tensor, y: Any) -> Tensor:
        return y.chunk(2, dim=-1)[which]

    def write(new: Tensor, x: Tensor, y: Any) -> Tensor:
        other = y.chunk(2, dim=-1)[1 - which]
        return torch.cat([other, new] if which else [new, other], dim=-1)

    return Port(module, "out", read, write)


def _channels(module: nn.Module, width: int, second: bool, keeps_padding: bool) -> Port:
    """Return the port of the first or second `width` numbers of a module's output."""
    where = slice(width, 2 * width) if second else slice(0, width)

    def write(new: Tensor, x: Tensor, y: Any) -> Tensor:
        mask = real(y) if keeps_padding else None  # a convolution would read padding into the prompt
        whole = y.clone()
        whole[..., where] = new if mask is None else torch.where(mask[..., None], new, y[..., where])
        return whole

    return Port(module, "out", lambda x, y: y[..., where], write)


def _router(module: nn.Module) -> Port:
    def read(x: Tensor, y: Any) -> Tensor:
        return y.view(_batch(y), -1, y.shape[-1])

    return Port(module, "out", read, lambda new, x, y: new.reshape(y.shape))


def _scale(anatomy: Anatomy, module: nn.Module) -> Port:
    def read(x: Tensor, y: Any) -> Tensor:
        t = x if x.ndim == 3 else x.view(_batch(x), -1, x.shape[-1])
        return anatomy.norm(module).scale(t)

    def write(new: Tensor, x: Tensor, y: Any) -> Tensor:
        norm = anatomy.norm(module)
        factor = (norm.scale(x) / new.reshape(x.shape[:-1])).unsqueeze(-1)
        return (norm.bias + (wide(y) - norm.bias) * factor).to(y.dtype)

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
