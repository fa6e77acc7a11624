"""Measured multiplier of contributions to the stream, in families without a row.

Known numbers replace the outputs of attention and MLP, and zeros the stream that enters each block; what leaves
it is then multiplier · (attention's numbers + MLP's numbers), or something else is added or done to the stream, and
the self-check disables the sites.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.models.access import taps
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.anatomy.unembedding import FAULTS, quietly, ratio, same


def measured(anatomy: Anatomy) -> float:
    """Return the one factor of every contribution, 1 where there is none or not one for all."""
    if any(p.is_meta for p in anatomy.hf.parameters()):
        return 1.0
    known: dict[nn.Module, Tensor] = {}
    left: dict[int, Tensor] = {}
    g = torch.Generator().manual_seed(0)

    def empty(module: nn.Module, args: Any, kw: Any) -> Any:
        x = torch.zeros_like(args[0] if args else kw["hidden_states"])
        return ((x, *args[1:]), kw) if args else (args, {**kw, "hidden_states": x})

    def written(module: nn.Module, args: Any, out: Any) -> Any:
        y = taps.tensor_of(out)
        known[module] = torch.randn(y.shape, generator=g).to(torch.bfloat16).to(y.device, y.dtype)
        return taps.with_tensor(out, known[module].clone())

    def leave(i: int, module: nn.Module, args: Any, out: Any) -> None:
        left[i] = taps.tensor_of(out)

    writers = [
        (
            anatomy.part(i, "ln1_post") or anatomy.part(i, "o"),
            anatomy.part(i, "ln2_post") or anatomy.part(i, "down") or anatomy.part(i, "mlp"),
        )
        for i in range(len(anatomy.blocks))
    ]
    with ExitStack() as stack:
        for i, (block, pair) in enumerate(zip(anatomy.blocks, writers, strict=True)):
            stack.callback(block.register_forward_pre_hook(empty, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(partial(leave, i)).remove)
            for module in pair:
                if module is not None:
                    stack.callback(module.register_forward_hook(written).remove)
        try:
            quietly(anatomy)
            added = [
                torch.stack([known[m].reshape(left[i].shape).double() for m in pair if m is not None]).sum(0)
                for i, pair in enumerate(writers)
            ]
        except FAULTS:
            return 1.0
    factor = ratio(torch.cat([t.reshape(-1) for t in left.values()]), torch.cat([t.reshape(-1) for t in added]))
    return factor if all(same(left[i], factor * a) for i, a in enumerate(added)) else 1.0
