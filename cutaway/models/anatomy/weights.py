"""Weights as views under the field's names; norms are folded on the view, never in the model.

Shapes: W_Q, W_K, W_V [head, d_model, d_head] · W_O [head, d_head, d_model] · W_in, W_gate [d_model, d_mlp] ·
W_out [d_mlp, d_model] · W_E [d_vocab, d_model] · W_U [d_model, d_vocab]: inputs first, so that x @ W reads as written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cutaway.core.refuse import Refused
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.anatomy.linear import bias, is_linear, matrix, table
from cutaway.models.anatomy.projections import split_fused
from cutaway.models.anatomy.unembedding import unembedding

OV, QK = "OV circuit", "QK circuit"  # the names under which the self-check can disable them


@dataclass(frozen=True)
class Factored:
    """A low-rank matrix left @ right that is never multiplied out: OV and QK circuits."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]

    @property
    def matrix(self) -> Float[Tensor, "rows columns"]:
        """The product, formed on demand."""
        return self.left @ self.right

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, S, Vh of the product at the cost of its rank (two QR factorisations)."""
        ql, rl = torch.linalg.qr(self.left.float())
        qr, rr = torch.linalg.qr(self.right.float().T)
        u, s, vh = torch.linalg.svd(rl @ rr.T)
        return ql @ u, s, vh @ qr.T

    def norm(self) -> Tensor:
        """Frobenius norm."""
        gram = (self.left.float().T @ self.left.float()) @ (self.right.float() @ self.right.float().T)
        return gram.trace().clamp_min(0).sqrt()

    @property
    def T(self) -> Factored:  # noqa: N802 (the transpose's own name)
        """The transpose."""
        return Factored(self.right.T, self.left.T)


@dataclass(frozen=True)
class Weights:
    """Views of one model's weights. With `folded`, the norm before each reader is multiplied into it.

    Folded readers take the *normalised* stream (x − centre) / scale; their biases absorb the norm's bias.
    """

    body: Anatomy
    is_folded: bool = False

    def folded(self) -> Weights:
        """The same views with norms folded in.

        Raises:
            Refused: the family norms outputs or the raw stream, where folding is no identity.
        """
        f = self.body.family
        if f.post_norm or f.ln1 is None:
            raise Refused(
                f"folded weights of {f.name}", "its norms stand after the layers, not before", "use plain weights"
            )
        return Weights(self.body, True)

    def q(self, layer: int) -> Float[Tensor, "head d_model d_head"]:
        """W_Q of a layer."""
        return self._fold(self._qkv(layer)[0], layer, "ln1")

    def k(self, layer: int) -> Float[Tensor, "kv_head d_model d_head"]:
        """W_K of a layer."""
        return self._fold(self._qkv(layer)[1], layer, "ln1")

    def v(self, layer: int) -> Float[Tensor, "kv_head d_model d_head"]:
        """W_V of a layer."""
        return self._fold(self._qkv(layer)[2], layer, "ln1")

    def qkv_bias(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """b_Q [head, d_head], b_K and b_V [kv_head, d_head]; zeros where the family has none."""
        biases = self._qkv_bias(layer)
        if not self.is_folded:
            return biases
        shift = self._norm(layer, "ln1").bias
        q, k, v = (
            torch.einsum("d,hde->he", shift.to(w.dtype), w) + b for w, b in zip(self._qkv(layer), biases, strict=True)
        )
        return q, k, v

    def o(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O of a layer."""
        w = matrix(self._need(layer, "o"))
        return w.reshape(self.body.shape.n_heads, -1, w.shape[-1])

    def o_bias(self, layer: int) -> Float[Tensor, "d_model"]:
        """b_O of a layer, zeros where there is none."""
        return bias(self._need(layer, "o"))

    def mlp_in(self, layer: int) -> Float[Tensor, "d_model d_mlp"]:
        """W_in of a layer (the linear branch of a gated MLP)."""
        self._vouched("mlp_in")
        w = matrix(self._need(layer, "up"))
        w = w.chunk(2, dim=1)[1] if self.body.family.fused_gate else w
        return self._fold(w, layer, "ln2" if self.body.family.ln2 else "ln1")

    def mlp_gate(self, layer: int) -> Float[Tensor, "d_model d_mlp"]:
        """W_gate of a layer."""
        self._vouched("mlp_gate")
        w = matrix(self._need(layer, "gate"))
        w = w.chunk(2, dim=1)[0] if self.body.family.fused_gate else w
        return self._fold(w, layer, "ln2" if self.body.family.ln2 else "ln1")

    def mlp_in_bias(self, layer: int) -> Float[Tensor, "d_mlp"]:
        """b_in of a layer, zeros where there is none."""
        return self._mlp_bias(layer, "up", 1)

    def mlp_gate_bias(self, layer: int) -> Float[Tensor, "d_mlp"]:
        """b_gate of a layer, zeros where there is none."""
        return self._mlp_bias(layer, "gate", 0)

    def mlp_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """W_out of a layer: row n is what neuron n writes."""
        return matrix(self._need(layer, "down"))

    def mlp_out_bias(self, layer: int) -> Float[Tensor, "d_model"]:
        """b_out of a layer, zeros where there is none."""
        return bias(self._need(layer, "down"))

    @property
    def embed(self) -> Float[Tensor, "d_vocab d_model"]:
        """W_E as stored (before a family's embedding multiplier), through the projection of a family that has one."""
        rows, projection = table(self.body.hf.get_input_embeddings()), self.body.top("embed")
        return rows @ matrix(projection) if projection is not None and is_linear(projection) else rows

    @property
    def unembed(self) -> Float[Tensor, "d_model d_vocab"]:
        """W_U with the scale that the family gives its logits; tied weights are untied only in the folded view."""
        w = unembed_rows(self.body)[0].T
        return w * self._final().weight.to(w.dtype)[:, None] if self.is_folded else w

    @property
    def unembed_bias(self) -> Float[Tensor, "d_vocab"]:
        """b_U, zeros where there is none."""
        rows, own = unembed_rows(self.body)
        return own + rows @ self._final().bias.to(own.dtype) if self.is_folded else own

    def ov(self, layer: int, head: int) -> Factored:
        """W_V W_O of one query head: what it writes, as a map of what it reads (Elhage et al. 2021).

        Raises:
            Refused: values or z are not what the weights make of what attention reads (a gate, a norm between).
        """
        self._right(OV, layer, head)
        return Factored(self.v(layer)[self._kv(head)], self.o(layer)[head])

    def qk(self, layer: int, head: int) -> Factored:
        """W_Q W_Kᵀ of one query head, unscaled. With rotary positions this is the form at distance zero.

        Raises:
            Refused: queries and keys are normed or scaled by position, so that no bilinear form exists.
        """
        self._right(QK, layer, head)
        if any(
            self.body.part(layer, "attn") is not None and _child(self.body.blocks[layer], p)
            for p in self.body.family.qk_norm
        ):
            raise Refused(f"{QK} {layer}.{head}", "queries and keys are normed: not a bilinear form", "capture scores")
        return Factored(self.q(layer)[head], self.k(layer)[self._kv(head)].T)

    def _right(self, circuit: str, layer: int, head: int) -> None:
        if circuit in self.body.disabled:
            raise Refused(f"{circuit} {layer}.{head}", self.body.disabled[circuit], "capture v, z or scores")

    def _kv(self, head: int) -> int:
        return head // (self.body.shape.n_heads // self.body.shape.n_kv_heads)

    def _vouched(self, name: str) -> None:
        """Refuse a view that the self-check found to be another than what the model does."""
        if why := self.body.disabled.get(f"weights.{name}"):
            raise Refused(f"weights.{name} of {self.body.family.name}", why, "read the weights through model.hf")

    def _qkv(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        self._vouched("v")
        s = self.body.shape
        fused = self.body.part(layer, "fused")
        if fused is None:
            parts = [matrix(self._need(layer, n)) for n in "qkv"]
            q, k, v = (p.reshape(p.shape[0], -1, s.d_head).transpose(0, 1) for p in parts)
            return q, k, v
        q, k, v = split_fused(self.body, matrix(fused))
        return q, k, v

    def _qkv_bias(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        fused = self.body.part(layer, "fused")
        if fused is None:
            q, k, v = (bias(self._need(layer, n)).reshape(-1, self.body.shape.d_head) for n in "qkv")
            return q, k, v
        q, k, v = (p[:, 0] for p in split_fused(self.body, bias(fused)[None]))
        return q, k, v

    def _mlp_bias(self, layer: int, name: str, half: int) -> Tensor:
        module, halves = self._need(layer, name), 2 if self.body.family.fused_gate else 1
        own = bias(module).chunk(halves)[half % halves]
        if not self.is_folded:
            return own
        w = matrix(module).chunk(halves, dim=1)[half % halves]
        shift = self._norm(layer, "ln2" if self.body.family.ln2 else "ln1").bias
        return own + shift.to(w.dtype) @ w

    def _fold(self, w: Tensor, layer: int, ln: str) -> Tensor:
        return w * self._norm(layer, ln).weight.to(w.dtype)[:, None] if self.is_folded else w

    def _norm(self, layer: int, name: str) -> Any:
        module = self.body.part(layer, name) or self.body.part(layer, "ln1")
        if module is None:
            raise Refused(f"{name} of layer {layer}", "there is no such norm", "use plain weights")
        return self.body.norm(module)

    def _final(self) -> Any:
        module = self.body.top("final")
        if module is None or unembedding(self.body).cap:
            raise Refused("folded W_U", "there is no final norm to fold, or a soft cap follows", "use plain weights")
        return self.body.norm(module)

    def _need(self, layer: int, name: str) -> nn.Module:
        module = self.body.part(layer, name)
        if module is None:
            raise Refused(
                f"weight {name!r} of layer {layer}", f"{self.body.family.name} has none there", "see model.sites()"
            )
        return module


def unembed_rows(
    body: Anatomy, ids: Int[Tensor, "*token"] | None = None, dtype: torch.dtype | None = None
) -> tuple[Float[Tensor, "*token d_model"], Float[Tensor, "*token"]]:
    """What the logits of some tokens (by default of all) read of the final norm's output, and their biases.

    Raises:
        Refused: there is no unembedding, it is no linear map of the final norm's output, or it is quantised.
    """
    way = unembedding(body)
    if why := body.disabled.get("weights.unembed"):
        raise Refused(f"W_U of {body.family.name}", why, "read the model's own logits: run or run_last")
    if way.why or not way.linear:
        why = way.why or "what stands between its final norm and its unembedding is not linear"
        raise Refused(f"W_U of {body.family.name}", why, "read the model's own logits: run or run_last")
    rows, own = (t[: way.width] if ids is None else t[ids] for t in (matrix(way.head).T, bias(way.head)))
    rows, own = rows.to(dtype or rows.dtype), own.to(dtype or own.dtype)
    for m in reversed(way.between):
        own = own + rows @ bias(m).to(rows.dtype) * way.gain
        rows = rows @ matrix(m).T.to(rows.dtype)
    return (rows if (c := way.gain * way.scale) == 1.0 else rows * c), own if way.scale == 1.0 else own * way.scale


def _child(block: nn.Module, path: str) -> bool:
    for name in path.split("."):
        block = getattr(block, name, None)  # type: ignore[assignment]
    return block is not None
