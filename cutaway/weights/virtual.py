"""Virtual weights: how strongly one component's output drives another's input, straight through the residual stream.

The product of what a component writes and what a later one reads (Elhage et al. 2021) stays factored, with norms folded
in and their scales left out. Two heads in a row are a virtual head, whose OV circuit is the product of theirs; it moves
from k to q by the product of their patterns (`virtual_pattern`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address, parse
from cutaway.core.refuse import Refused
from cutaway.models import circuits
from cutaway.models.anatomy.norms import wide
from cutaway.models.anatomy.per_layer import Factored
from cutaway.models.anatomy.weights import Weights, logit_readers
from cutaway.models.model import Model

#: site → weights [layer, (head,) unit, d_model] that write it into the stream, or [.., d_model, unit] that read it off
WRITERS: Mapping[str, Callable[[Weights, int], Tensor]] = {
    "z": lambda w, i: w.o[i],
    "mlp_post": lambda w, i: w.mlp_out[i],
}
READERS: Mapping[str, Callable[[Weights, int], Tensor]] = {
    "q": lambda w, i: w.q[i],
    "k": lambda w, i: w.k[i],
    "v": lambda w, i: w.v[i],
    "mlp_pre": lambda w, i: w.mlp_in[i],
    "mlp_gate": lambda w, i: w.mlp_gate[i],
}


@torch.no_grad()
def virtual_weights(model: Model, writer: str, reader: str) -> Factored:
    """Return the weights between two components, factored [units of the writer, units of the reader].

    Args:
        model: the model.
        writer: `embed` (a row per token), a head as `z.9.6`, an MLP as `mlp_post.3`, or a neuron as `mlp_post.3.17`.
        reader: `q.10.0`, `k.10.0` or `v.10.0` of a (key-value) head, `mlp_pre.4` or a neuron's `mlp_pre.4.17`
            (`mlp_gate` for the gate of a gated MLP), or `logits` (a column per token).

    Raises:
        Refused: no such component, or a reader that does not come after the writer.
    """
    w, out, into = circuits.readable(model), parse(writer), parse(reader)
    names = ("embed", *WRITERS, *READERS, "logits")
    if not comes_after(model, out, into):
        raise Refused(f"virtual weights {writer} → {reader}", "the reader comes first", "name a later reader")
    if (out.site not in WRITERS and writer != "embed") or (into.site not in READERS and reader != "logits"):
        what = f"virtual weights {writer} → {reader}"
        raise Refused(what, "one of them does not write to, or read from, the stream", f"use {', '.join(names)}")
    left = w.embed if writer == "embed" else _part(WRITERS[out.site](w, _layer(model, out)), out, -2)
    if reader == "logits":
        right = logit_readers(model.anatomy, dtype=torch.promote_types(model.dtype, torch.float32)).T
    else:
        right = _part(READERS[into.site](w, _layer(model, into)), into, -1)
    left, right = wide(left.detach()), wide(right.detach())
    if circuits.centred(model):
        left, right = left - left.mean(-1, keepdim=True), right - right.mean(-2, keepdim=True)
    return Factored(left, right)


def comes_after(model: Model, writer: Address, reader: Address) -> bool:
    """Return True if a component reads the stream after another has written to it."""
    if writer.layer is None or reader.layer is None:
        return True
    inside = writer.site == "z" and reader.site.startswith("mlp") and not model.anatomy.parallel
    return reader.layer > writer.layer or (reader.layer == writer.layer and inside)


@torch.no_grad()
def virtual_head(model: Model, first: str, then: str) -> Factored:
    """Return the OV circuit of two heads in a row, `9.6` and a later one: W_OV of the first times that of the second.

    Raises:
        Refused: no such head, or the second does not come after the first.
    """
    (a,), (b,) = circuits.heads(model, [first]), circuits.heads(model, [then])
    if (a.layer or 0) >= (b.layer or 0):
        raise Refused(f"virtual head {first} → {then}", "the second does not come after the first", "exchange them")
    one, two = circuits.ov(model, [a])[0], circuits.ov(model, [b])[0]
    return Factored(one.left, (one.right @ two.left) @ two.right)


def virtual_pattern(
    first: Float[Tensor, "*#batch q_pos k_pos"], then: Float[Tensor, "*#batch q_pos k_pos"]
) -> Float[Tensor, "*#batch q_pos k_pos"]:
    """Return the pattern of two heads in a row, from the patterns of both: its rows sum to 1, as theirs do."""
    return then @ first


def _layer(model: Model, place: Address) -> int:
    if place.layer is None or not 0 <= place.layer < model.shape.n_layers:
        raise Refused(f"component {place}", "no such layer", f"use 0 to {model.shape.n_layers - 1}")
    return place.layer


def _part(w: Tensor, place: Address, axis: int) -> Tensor:
    """Return the weights of one head or neuron, or those of a whole MLP; a neuron keeps its axis, of length 1."""
    if place.position is not None or (w.ndim == 3 and place.unit is None):
        raise Refused(f"component {place}", "it is not one head", "write for example z.9.6")
    size = len(w) if w.ndim == 3 else w.shape[axis]
    if place.unit is None:
        return w
    if not 0 <= place.unit < size:
        raise Refused(f"component {place}", "there is no such head or neuron", f"use 0 to {size - 1}")
    return w[place.unit] if w.ndim == 3 else w.narrow(axis, place.unit, 1)
