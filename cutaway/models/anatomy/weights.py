"""Weights as views under the field's names; norms are folded on the view, never in the model.

W_Q, W_K, W_V [layer head d_model d_head], W_O [layer head d_head d_model], W_in, W_gate [layer d_model d_mlp], W_out
[layer d_mlp d_model], W_E [d_vocab d_model], W_U [d_model d_vocab]: inputs first, so that x @ W reads as written.
`weights.q[5]` is one layer, `weights.q[:]` all of them; circuits are functions of layer and head, `weights.ov(9, 6)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cutaway.core.refuse import Code, Refused
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.anatomy.families import find
from cutaway.models.anatomy.linear import bias, is_linear, matrix, table
from cutaway.models.anatomy.per_layer import Factored, PerLayer, within
from cutaway.models.anatomy.projections import split_fused
from cutaway.models.anatomy.unembedding import unembedding

OV, QK = "OV circuit", "QK circuit"  # the names under which the self-check can disable them


class View:
    """A weight under its name in `Weights`, of all layers: `weights.q` is the `PerLayer` of W_Q.

    Attributes:
        name: the name it has there.
        of: returns the weight of a layer.
    """

    def __init__(self, doc: str, of: Callable[[Weights, int], Tensor]):
        self.__doc__, self.name, self.of = doc, "", of

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, weights: Weights, owner: type) -> PerLayer:
        return PerLayer(self.name, weights.anatomy.shape.n_layers, partial(self.of, weights))


@dataclass(frozen=True)
class Weights:
    """Views of one model's weights. With `folded`, the norm before each reader is multiplied into it.

    Folded readers take the *normalised* stream (x − centre) / scale; their biases absorb the norm's bias.
    """

    anatomy: Anatomy
    is_folded: bool = False

    def folded(self) -> Weights:
        """Return the same views with norms folded in.

        Raises:
            Refused: the family norms outputs or the raw stream, where folding is not an identity.
        """
        f = self.anatomy.family
        if f.post_norm or f.ln1 is None:
            raise Refused(
                f"folded weights of {f.name}", "its norms stand after the layers, not before", "use plain weights"
            )
        return Weights(self.anatomy, True)

    q = View("W_Q [layer head d_model d_head]", lambda w, i: w._fold(w._qkv(i)[0], i, "ln1"))
    k = View("W_K [layer kv_head d_model d_head]", lambda w, i: w._fold(w._qkv(i)[1], i, "ln1"))
    v = View("W_V [layer kv_head d_model d_head]", lambda w, i: w._fold(w._qkv(i)[2], i, "ln1"))
    o = View("W_O [layer head d_head d_model]", lambda w, i: w._o(i))
    mlp_in = View("W_in [layer d_model d_mlp], the linear branch of a gated MLP", lambda w, i: w._mlp("mlp_in", i))
    mlp_gate = View("W_gate [layer d_model d_mlp]", lambda w, i: w._mlp("mlp_gate", i))
    mlp_out = View(
        "W_out [layer d_mlp d_model]: row n is what neuron n writes", lambda w, i: matrix(w._need(i, "down"))
    )

    # Biases are zeros where the family has none.
    q_bias = View("b_Q [layer head d_head]", lambda w, i: w._qkv_bias(i)[0])
    k_bias = View("b_K [layer kv_head d_head]", lambda w, i: w._qkv_bias(i)[1])
    v_bias = View("b_V [layer kv_head d_head]", lambda w, i: w._qkv_bias(i)[2])
    o_bias = View("b_O [layer d_model]", lambda w, i: bias(w._need(i, "o")))
    mlp_in_bias = View("b_in [layer d_mlp]", lambda w, i: w._mlp_bias("mlp_in", i))
    mlp_gate_bias = View("b_gate [layer d_mlp]", lambda w, i: w._mlp_bias("mlp_gate", i))
    mlp_out_bias = View("b_out [layer d_model]", lambda w, i: bias(w._need(i, "down")))

    @property
    def embed(self) -> Float[Tensor, "d_vocab d_model"]:
        """W_E as stored (before a family's embedding multiplier), through the projection of a family that has one."""
        rows, projection = table(self.anatomy.hf.get_input_embeddings()), self.anatomy.top("embed")
        return rows @ matrix(projection) if projection is not None and is_linear(projection) else rows

    @property
    def unembed(self) -> Float[Tensor, "d_model d_vocab"]:
        """W_U with the scale that the family gives its logits; tied weights are untied only in the folded view."""
        w = unembed_rows(self.anatomy)[0].T
        return w * self._final().weight.to(w.dtype)[:, None] if self.is_folded else w

    @property
    def unembed_bias(self) -> Float[Tensor, "d_vocab"]:
        """b_U, zeros where there is none."""
        rows, own = unembed_rows(self.anatomy)
        return own + rows @ self._final().bias.to(own.dtype) if self.is_folded else own

    def ov(self, layer: int | None = None, head: int | None = None) -> Factored:
        """Return W_V W_O of a query head: what it writes, as a map of what it reads (Elhage et al. 2021).

        Without a head, of all heads of the layer [head d_model d_model]; without a layer, of all layers.

        Raises:
            Refused: values or z are not what the weights make of what attention reads (a gate, a norm between).
        """
        return self._circuit(OV, layer, head, lambda i, h: Factored(self.v[i][self._kv(h)], self.o[i][h]))

    def qk(self, layer: int | None = None, head: int | None = None) -> Factored:
        """Return W_Q W_Kᵀ of a query head, unscaled. With rotary positions this is the form at distance zero.

        Without a head, of all heads of the layer [head d_model d_model]; without a layer, of all layers.

        Raises:
            Refused: queries and keys are normed or scaled by position, so that no bilinear form exists.
        """

        def form(i: int, h: int | slice) -> Factored:
            block = self.anatomy.blocks[i]
            if self.anatomy.part(i, "attn") is not None and any(
                find(block, p) is not None for p in self.anatomy.family.qk_norm
            ):
                named = f"{QK} {i}" + ("" if isinstance(h, slice) else f".{h}")
                raise Refused(named, "queries and keys are normed: not a bilinear form", "capture scores")
            return Factored(self.q[i][h], self.k[i][self._kv(h)].mT)

        return self._circuit(QK, layer, head, form)

    def _circuit(
        self, name: str, layer: int | None, head: int | None, of: Callable[[int, int | slice], Factored]
    ) -> Factored:
        """Return a circuit of one head, of all heads of a layer, or of all layers."""
        if name in self.anatomy.disabled:
            where = " " + ".".join(str(n) for n in (layer, head) if n is not None) if layer is not None else ""
            raise Refused(f"{name}{where}", self.anatomy.disabled[name], "capture v, z or scores")
        s = self.anatomy.shape
        h = slice(None) if head is None else within(head, s.n_heads, name, "head")
        if layer is not None:
            return of(within(layer, s.n_layers, name, "layer"), h)
        every = [of(i, h) for i in range(s.n_layers)]
        return Factored(torch.stack([f.left for f in every]), torch.stack([f.right for f in every]))

    def _kv(self, head: int | slice) -> int | Tensor | slice:
        """Return the index of the key-value head of a query head, or those of all heads."""
        group = self.anatomy.shape.n_heads // self.anatomy.shape.n_kv_heads
        if isinstance(head, int):
            return head // group
        return head if group == 1 else torch.arange(self.anatomy.shape.n_heads) // group

    def _vouched(self, name: str) -> None:
        """Refuse a view that the self-check found to be another than what the model does."""
        if why := self.anatomy.disabled.get(f"weights.{name}"):
            raise Refused(
                f"weights.{name} of {self.anatomy.family.name}", why, Code("read the weights through model.hf")
            )

    def _qkv(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        self._vouched("v")
        s = self.anatomy.shape
        fused = self.anatomy.part(layer, "fused")
        if fused is None:
            parts = [matrix(self._need(layer, n)) for n in "qkv"]
            q, k, v = (p.reshape(p.shape[0], -1, s.d_head).transpose(0, 1) for p in parts)
            return q, k, v
        q, k, v = split_fused(self.anatomy, matrix(fused))
        return q, k, v

    def _qkv_bias(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        fused = self.anatomy.part(layer, "fused")
        if fused is None:
            q, k, v = (bias(self._need(layer, n)).reshape(-1, self.anatomy.shape.d_head) for n in "qkv")
        else:
            q, k, v = (p[:, 0] for p in split_fused(self.anatomy, bias(fused)[None]))
        if not self.is_folded:
            return q, k, v
        shift = self._norm(layer, "ln1").bias
        folded = (torch.einsum("d,hde->he", shift.to(w.dtype), w) for w in self._qkv(layer))
        q, k, v = (f + b for f, b in zip(folded, (q, k, v), strict=True))
        return q, k, v

    def _o(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        w = matrix(self._need(layer, "o"))
        return w.reshape(self.anatomy.shape.n_heads, -1, w.shape[-1])

    def _mlp(self, name: str, layer: int) -> Float[Tensor, "d_model d_mlp"]:
        self._vouched(name)
        return self._fold(self._half(name, matrix(self._mlp_module(name, layer))), layer, "ln2")

    def _mlp_bias(self, name: str, layer: int) -> Float[Tensor, "d_mlp"]:
        module = self._mlp_module(name, layer)
        own = self._half(name, bias(module))
        if not self.is_folded:
            return own
        w = self._half(name, matrix(module))
        return own + self._norm(layer, "ln2").bias.to(w.dtype) @ w

    def _mlp_module(self, name: str, layer: int) -> nn.Module:
        return self._need(layer, "up" if name == "mlp_in" else "gate")

    def _half(self, name: str, w: Tensor) -> Tensor:
        """Return the columns of a branch of the MLP; a fused projection holds the gate first, then the linear one."""
        return w.chunk(2, dim=-1)[name == "mlp_in"] if self.anatomy.family.fused_gate else w

    def _fold(self, w: Tensor, layer: int, ln: str) -> Tensor:
        return w * self._norm(layer, ln).weight.to(w.dtype)[:, None] if self.is_folded else w

    def _norm(self, layer: int, name: str) -> Any:
        """Return the norm before attention or MLP; a block with one norm has it before both."""
        module = self.anatomy.part(layer, name) or self.anatomy.part(layer, "ln1")
        if module is None:
            raise Refused(f"{name} of layer {layer}", "there is no such norm", "use plain weights")
        return self.anatomy.norm(module)

    def _final(self) -> Any:
        module = self.anatomy.top("final")
        if module is None or unembedding(self.anatomy).cap:
            raise Refused("folded W_U", "there is no final norm to fold, or a soft cap follows", "use plain weights")
        return self.anatomy.norm(module)

    def _need(self, layer: int, name: str) -> nn.Module:
        module = self.anatomy.part(layer, name)
        if module is None:
            raise Refused(
                f"weight {name!r} of layer {layer}",
                f"{self.anatomy.family.name} has none there",
                ("see ", Code("model.sites()")),
            )
        return module


def unembed_rows(
    anatomy: Anatomy, ids: Int[Tensor, "*token"] | None = None, dtype: torch.dtype | None = None
) -> tuple[Float[Tensor, "*token d_model"], Float[Tensor, "*token"]]:
    """Return the rows of the unembedding that give the logits of some tokens (by default of all), and their biases.

    Raises:
        Refused: the model has no unembedding, or one that is quantised or not linear in the final norm's output.
    """
    way = unembedding(anatomy)
    if why := anatomy.disabled.get("weights.unembed"):
        raise Refused(f"W_U of {anatomy.family.name}", why, "read the model's own logits: run or run_last")
    if way.why or not way.linear:
        why = way.why or "what stands between its final norm and its unembedding is not linear"
        raise Refused(f"W_U of {anatomy.family.name}", why, "read the model's own logits: run or run_last")
    rows, own = (t[: way.width] if ids is None else t[ids] for t in (matrix(way.head).T, bias(way.head)))
    rows, own = rows.to(dtype or rows.dtype), own.to(dtype or own.dtype)
    for m in reversed(way.between):
        own = own + rows @ bias(m).to(rows.dtype) * way.gain
        rows = rows @ matrix(m).T.to(rows.dtype)
    return (rows if (c := way.gain * way.scale) == 1.0 else rows * c), own if way.scale == 1.0 else own * way.scale


def logit_readers(
    anatomy: Anatomy, ids: Int[Tensor, "*token"] | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "*token d_model"]:
    """Return the vectors that read the logits of some tokens (by default of all) off the last stream.

    The final norm is folded into the rows of the unembedding: its weight, and the mean where it subtracts that. Its
    scale and all biases are left out.

    Raises:
        Refused: the model has no unembedding, or one that is quantised or not linear in the final norm's output.
    """
    rows, final = unembed_rows(anatomy, ids, dtype)[0], anatomy.top("final")
    return rows if final is None else anatomy.norm(final).folded(rows)
