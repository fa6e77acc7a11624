"""The circuit of a compiled model, read off its weights."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models.edits.wiring import Wiring
from cutaway.models.model import Model

_PARTS = {"q_in": 0, "k_in": 1, "v_in": 2}


def structural(model: Model, wiring: Wiring) -> Bool[Tensor, "writer reader"]:
    """Return the edges along which the program of a compiled model flows into its logits.

    An edge is one if the writer writes a dimension that the reader reads for the program's sake: for a place of a head
    or a unit of an MLP from which, in turn, something flows into the logits. What is computed beside the program is
    none of it. The last dimension, which only keeps the mean at 0, does not count.

    Raises:
        Refused: the model is not compiled, so its weights overlap everywhere.
    """
    if getattr(model.hf.config, "layer_norm_epsilon", 0.0) < 1.0:
        why = "its weights overlap everywhere, for it was not compiled"
        raise Refused(f"structural circuit of {model.name}", why, "load compiled/NAME")
    used, before = (model.hf.lm_head.weight != 0).any(0), None
    while before is None or not torch.equal(used, before):
        before = used
        reads = torch.stack([_reads(model, v, used) for v in wiring.readers])
        reads[:, -1] = False
        used = used | reads.any(0)
    writes = torch.stack([_writes(model, u) for u in wiring.writers])
    return (writes.float() @ reads.float().T > 0) & wiring.heard.to(writes.device)


def _writes(model: Model, writer: Address) -> Bool[Tensor, "d_model"]:
    """Return the dimensions that a writer can write."""
    body = model.hf.transformer
    if writer.layer is None:
        return (body.wte.weight != 0).any(0) | (body.wpe.weight != 0).any(0)
    block = body.h[writer.layer]
    if writer.unit is None:
        return (block.mlp.c_proj.weight != 0).any(0)
    return (block.attn.c_proj.weight[_columns(model, writer.unit)] != 0).any(0)


def _reads(model: Model, reader: Address, used: Bool[Tensor, "d_model"]) -> Bool[Tensor, "d_model"]:
    """Return the dimensions that a reader reads for the sake of what is used."""
    if reader.layer is None:
        return (model.hf.lm_head.weight != 0).any(0)
    block = model.hf.transformer.h[reader.layer]
    if reader.unit is None:
        units = (block.mlp.c_proj.weight[:, used] != 0).any(1)
        return (block.mlp.c_fc.weight[:, units] != 0).any(1)
    own = _columns(model, reader.unit)
    parts = [w[:, own] != 0 for w in block.attn.c_attn.weight.split(model.shape.d_model, 1)]  # each [d_model, d_head]
    taken = (block.attn.c_proj.weight[own][:, used] != 0).any(1)
    match reader.site:
        case "v_in":
            places = taken
        case "k_in":
            asked = parts[0].any(0) | (block.attn.c_attn.bias[own] != 0)
            places = asked & taken.any()
        case _:
            places = parts[1].any(0) & taken.any()
    return parts[_PARTS[reader.site]][:, places].any(1)


def _columns(model: Model, head: int) -> slice:
    return slice(head * model.shape.d_head, (head + 1) * model.shape.d_head)
