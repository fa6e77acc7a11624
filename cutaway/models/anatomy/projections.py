"""Projections of attention: W_Q, W_K and W_V of a layer, and their columns in the modules that hold them."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cutaway.core.refuse import Refused
from cutaway.models.anatomy.anatomy import Anatomy

Letter = Literal["q", "k", "v"]


def split_fused(anatomy: Anatomy, w: Float[Tensor, "rows columns"] | Int[Tensor, "rows columns"]) -> list[Tensor]:
    """Split a fused projection into q [head, rows, d_head], k and v [kv_head, rows, d_head].

    Raises:
        Refused: the family's order of queries, keys and values is not known.
    """
    s, rows = anatomy.shape, w.shape[0]
    if anatomy.family.qkv == "unknown":
        why = "the order of queries, keys and values in its fused projection is not known"
        raise Refused(f"W_Q, W_K, W_V of {anatomy.family.name}", why, "capture q, k and v instead")
    if anatomy.family.qkv == "concat":
        widths = [s.n_heads * s.d_head, s.n_kv_heads * s.d_head, s.n_kv_heads * s.d_head]
        return [p.reshape(rows, -1, s.d_head).transpose(0, 1) for p in w.split(widths, dim=1)]
    grouped = w.reshape(rows, s.n_kv_heads, s.n_heads // s.n_kv_heads + 2, s.d_head)
    q = grouped[:, :, :-2].reshape(rows, s.n_heads, s.d_head).transpose(0, 1)
    return [q, grouped[:, :, -2].transpose(0, 1), grouped[:, :, -1].transpose(0, 1)]


def projection(anatomy: Anatomy, layer: int, letter: Letter) -> tuple[nn.Module, Int[Tensor, "head d_head"]] | None:
    """Find the module that makes queries, keys or values, and the output columns of each head (for keys and values:
    of each key-value head). None if this layer has no such module, or one of another form (latent attention, a gate
    beside the queries).
    """
    s, fused = anatomy.shape, anatomy.part(layer, "fused")
    module = fused if fused is not None else anatomy.part(layer, letter)
    if module is None or not s.d_head:
        return None
    heads = s.n_heads if letter == "q" else s.n_kv_heads
    width = (s.n_heads + 2 * s.n_kv_heads if fused is not None else heads) * s.d_head
    if (getattr(module, "out_features", None) or getattr(module, "nf", None)) != width:
        return None
    columns = torch.arange(width)[None]
    if fused is None:
        return module, columns.reshape(heads, s.d_head)
    if anatomy.family.qkv == "unknown":
        return None
    return module, split_fused(anatomy, columns)["qkv".index(letter)][:, 0]
