"""Prompts as ids for tiny models of every family, and the definition of an edge's change and gradient by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import cutaway as ca
from cutaway.core.address import Address
from cutaway.models.edits.wiring import Wiring, wiring
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound
from cutaway.tasks.pair import Pair
from cutaway.tasks.readouts import readout
from tests.models.tiny import build

FAMILIES = ("gpt2", "llama_gqa", "gemma2", "gpt_neox_parallel", "qwen2", "olmo2", "cohere", "granite")


@cache
def model(name: str) -> Model:
    """A model in double precision: the effect of one edge is small beside the rounding of a metric."""
    return ca.load(build(name, dtype=torch.float64))


def bound(m: Model, lengths: tuple[int, ...] = (6, 6), side: Any = "right") -> Bound:
    """Prompts of these lengths, whose corrupt partners have two other tokens."""
    g = torch.Generator().manual_seed(0)
    clean = [torch.randint(3, 101, (n,), generator=g).tolist() for n in lengths]
    corrupt = [[*ids[:2], (ids[2] + 7) % 98 + 3, *ids[3:-1], (ids[-1] + 5) % 98 + 3] for ids in clean]
    pairs = tuple(Pair(f"clean {i}", f"corrupt {i}", " a", " b") for i in range(len(lengths)))
    answers, foils = (torch.randint(3, 101, (len(lengths),), generator=g) for _ in range(2))
    t, u = (ca.models.tokens.batch(rows, side=side) for rows in (clean, corrupt))
    return Bound(pairs, t, u, answers, foils, readout("logit_diff"))


def norm_of(m: Model, reader: Address) -> tuple[Any, str]:
    """The module between a reader and the stream, and the stream."""
    a, i = m.anatomy, reader.layer
    if i is None:
        return None, f"resid_post.{m.shape.n_layers - 1}"
    first = reader.site != "mlp_in" or (a.parallel and a.part(i, "ln2") is None)
    stream = "resid_pre" if reader.site != "mlp_in" or a.parallel else "resid_mid"
    return a.part(i, "ln1" if first else "ln2"), f"{stream}.{i}"


@torch.no_grad()
def written(m: Model, w: Wiring, tokens: Any) -> list[Tensor]:
    """What every writer adds to the stream, from the heads' own outputs and the norm behind attention."""
    acts = m.capture(tokens, ["resid_pre.0", "head_out", "attn_out", "mlp_out"])
    out = [acts["resid_pre.0"]]
    for u in w.writers[1:]:
        if u.site == "mlp_out":
            out.append(acts[str(u)])
            continue
        x, post = acts[f"head_out.{u.layer}.{u.unit}"], m.anatomy.part(u.layer, "ln1_post")
        if post is not None:  # weight · x / root mean square of all heads' sum
            total, ones = acts[f"head_out.{u.layer}"].sum(2), torch.ones(m.shape.d_model, dtype=m.dtype)
            x = x * post(ones) / (total.square().mean(-1, keepdim=True) + m.hf.config.rms_norm_eps).sqrt()
        out.append(x * m.anatomy.multiplier)
    return out


def changes(m: Model, b: Bound) -> list[Tensor]:
    """What every writer adds in the corrupt run less what it adds in the clean run."""
    w = wiring(m)
    return [y - x for x, y in zip(written(m, w, b.clean), written(m, w, b.corrupt), strict=True)]
