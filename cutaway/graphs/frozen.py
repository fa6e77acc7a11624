"""The model around its MLPs, linear for one prompt: attention patterns and the divisors of norms stay as they were.

What MLPs write is then a source like the embedding, and every reader (of an MLP, or of the logits) is a sum over
sources along residual stream and OV circuits (Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs).
Readers are vectors against the stream, and go down the layers by the transposes of these maps; norms' weights and
centring, norms behind attention (Gemma 2, OLMo 2) and the family's residual multiplier are folded in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cutaway.core.refuse import Refused
from cutaway.models.access.capture import Activations
from cutaway.models.anatomy.norms import Norm, wide
from cutaway.models.anatomy.residual import check_sum
from cutaway.models.anatomy.weights import OV
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.answers import check_predicts


@dataclass(frozen=True)
class Attention:
    """Attention of one layer as a linear map of the stream.

    Attributes:
        into_z: takes readers of the stream to readers of the heads' outputs [d_model, head * d_head].
        into_stream: takes readers of values to readers of the stream [kv_head * d_head, d_model].
        pattern: attention probabilities over the divisors of the norms before and behind attention.
        constant: what it adds to the stream at each position, whatever the stream is.
    """

    into_z: Float[Tensor, "d_model z_width"]
    into_stream: Float[Tensor, "v_width d_model"]
    pattern: Float[Tensor, "head q_pos k_pos"]
    constant: Float[Tensor, "position d_model"]


@dataclass(frozen=True)
class Behind:
    """The norm behind an MLP with its divisor frozen, and the family's residual multiplier.

    Attributes:
        norm: the norm, or None.
        factor: the multiplier over the norm's divisor at each position.
        constant: what the norm's bias adds to the stream.
    """

    norm: Norm | None
    factor: Float[Tensor, "position"]
    constant: Float[Tensor, "d_model"]

    def rows(self, written: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return what is written as it enters the stream, but for `factor`."""
        return written if self.norm is None else self.norm.centre(written) * self.norm.weight


def check_linear(model: Model) -> None:
    """Check that a model is linear between its MLPs once patterns and norms' divisors are frozen.

    Raises:
        Refused: the family's stream is not a sum, it has no attention, or values are not linear in the stream.
    """
    check_predicts(model)
    check_sum(model)
    what = f"attribution graph of {model.name}"
    if model.family.ssm:
        raise Refused(what, "it has no attention to freeze", "use lenses.direct_attribution")
    if why := model.disabled.get(OV):
        raise Refused(what, f"its heads are no linear maps of the stream: {why}", "use a model of another family")


class Frozen:
    """A prompt's run of a model, linear between its MLPs.

    Attributes:
        model: the model.
        acts: the activations of the run; one prompt, without padding.
        dtype: the dtype of every number here: float32, or float64 of a model in float64.
        layers: the number of layers.
        width: the number of positions.
    """

    def __init__(self, model: Model, tokens: Tokens, sites: tuple[str, ...] = ()):
        """Run the prompt, and capture `sites` beside what the maps need; `check_linear` vouches for the model."""
        self.model, self.anatomy = model, model.anatomy
        self.layers, self.width = model.shape.n_layers, tokens.ids.shape[1]
        post = [f"z.{i}" for i in range(self.layers) if self.anatomy.part(i, "ln1_post") is not None]
        pos = ["pos_embed"] if self.anatomy.top("pos") is not None else []
        asked = ["resid_pre", "attn_out", "mlp_out", "mlp_in", "pattern", *post, *pos, *sites]
        self.acts: Activations = model.capture(tokens, [*asked, f"resid_post.{self.layers - 1}", "logits"])
        self.dtype = torch.promote_types(model.dtype, torch.float32)
        self.attention = [self._attention(i) for i in range(self.layers)]
        self._ln2 = [self._before(i, "ln2") for i in range(self.layers)]

    def at(self, address: str) -> Float[Tensor, "position *rest"]:
        """Return an activation of the prompt."""
        return self.acts[address][0].to(self.dtype)

    @cached_property
    def embeddings(self) -> dict[str, Float[Tensor, "position d_model"]]:
        """The parts of the first stream: of tokens, and of positions if they are added."""
        first = self.at("resid_pre.0")
        if "pos_embed" not in self.acts:
            return {"embed": first}
        return {"embed": first - self.at("pos_embed"), "pos_embed": self.at("pos_embed")}

    def entering(self, i: int) -> Float[Tensor, "position d_model"]:
        """Return the stream that the MLP of a layer reads, before its norm."""
        stream = self.at(f"resid_pre.{i}")
        return stream if self.anatomy.parallel else stream + self.at(f"attn_out.{i}")

    def attention_readers(
        self, i: int, rows: Float[Tensor, "row d_model"], position: int
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row"]]:
        """Return vectors that read what attention reads at one position as vectors that read the stream, and what they
        read of the norm's bias.
        """
        norm, scale = self._before(i, "ln1")
        return (
            (rows, torch.zeros_like(rows[:, 0]))
            if norm is None
            else (norm.folded(rows) / scale[position], rows @ norm.bias)
        )

    def mlp_readers(
        self, i: int, rows: Float[Tensor, "row d_model"], position: Int[Tensor, "row"]
    ) -> Float[Tensor, "row d_model"]:
        """Return vectors that read what an MLP reads at some positions as vectors that read the stream."""
        norm, scale = self._ln2[i]
        return rows if norm is None else norm.folded(rows) / scale[position, None]

    def final_readers(
        self, rows: Float[Tensor, "row d_model"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row"]]:
        """Return vectors that read the final norm's output at the last position as vectors that read the stream, and
        what they read of the norm's bias.
        """
        module = self.anatomy.top("final")
        if module is None:
            return rows, torch.zeros_like(rows[:, 0])
        norm = self._norm(module)
        scale = norm.scale(self.at(f"resid_post.{self.layers - 1}")[-1])
        return norm.folded(rows) / scale, rows @ norm.bias

    def mlp_shift(self, i: int) -> Float[Tensor, "d_model"]:
        """Return the constant part of what an MLP reads: the bias of its norm."""
        norm, _ = self._ln2[i]
        return torch.zeros_like(self.attention[i].constant[0]) if norm is None else norm.bias

    def behind_mlp(self, i: int, written: Float[Tensor, "position d_model"]) -> Behind:
        """Return the norm behind an MLP, with its divisor frozen where it reads `written`."""
        module, multiplier = self.anatomy.part(i, "ln2_post"), self.anatomy.multiplier
        if module is None:
            ones = written.new_full((self.width,), multiplier)
            return Behind(None, ones, torch.zeros_like(written[0]))
        norm = self._norm(module)
        return Behind(norm, multiplier / norm.scale(written), multiplier * norm.bias)

    def through_attention(self, i: int, g: Float[Tensor, "row q_pos d_model"], mixed: int) -> None:
        """Add to readers of the stream behind a layer's attention what they read through it, in place.

        Args:
            i: the layer.
            g: readers at positions 0 to the last one.
            mixed: the number of rows, in front, that read several positions; the others read the last one alone.
        """
        a, s = self.attention[i], self.model.shape
        width = g.shape[1]
        if mixed:
            values = self.values_of(i, g[:mixed])
            g[:mixed].view(-1, g.shape[2]).addmm_(values.flatten(0, 1), a.into_stream)
        if mixed < len(g):  # each head hands one vector to all positions
            z = (g[mixed:, -1] @ a.into_z).unflatten(1, (s.n_heads, -1))  # [row, head, d_head]
            into = a.into_stream.unflatten(0, (s.n_kv_heads, -1)).repeat_interleave(s.n_heads // s.n_kv_heads, 0)
            each = torch.bmm(z.transpose(0, 1), into).transpose(0, 1)  # [row, head, d_model]
            g[mixed:].baddbmm_(a.pattern[:, width - 1, :width].T.expand(len(z), -1, -1), each)

    def values_of(self, i: int, g: Float[Tensor, "row q_pos d_model"]) -> Float[Tensor, "row k_pos v_width"]:
        """Return readers of the stream behind a layer's attention as readers of the values that it moves."""
        a, s = self.attention[i], self.model.shape
        n, width, d = g.shape
        z = torch.mm(g.reshape(-1, d), a.into_z)
        heads = z.view(n, width, s.n_heads, -1).permute(2, 1, 0, 3).reshape(s.n_heads, width, -1)
        values = torch.bmm(a.pattern[:, :width, :width].mT, heads)  # [head, k_pos, row * d_head]
        values = values.view(s.n_kv_heads, -1, *values.shape[1:]).sum(1) if s.n_kv_heads < s.n_heads else values
        return values.view(s.n_kv_heads, width, n, -1).permute(2, 1, 0, 3).reshape(n, width, -1)

    def heads_of(self, i: int, x: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position head d_head"]:
        """Return z of a layer's heads of parts of the stream, over the divisors of the norms before and behind."""
        a, s = self.attention[i], self.model.shape
        values = (x @ a.into_stream.T).unflatten(-1, (s.n_kv_heads, -1))
        values = values.repeat_interleave(s.n_heads // s.n_kv_heads, 2)
        return torch.einsum("hqk,nkhe->nqhe", a.pattern, values)

    def attention_of(self, i: int, x: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position d_model"]:
        """Return what a layer's attention adds to the stream of parts of it."""
        return self.heads_of(i, x).flatten(2) @ self.attention[i].into_z.T

    def mlp_reads(self, i: int, x: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position d_model"]:
        """Return what an MLP reads of parts of the stream."""
        norm, scale = self._ln2[i]
        return x if norm is None else norm.linear(x, scale.expand(x.shape[:-1]))

    def _norm(self, module: nn.Module) -> Norm:
        """Return the affine form of a norm in the dtype of this run."""
        norm = self.anatomy.norm(module)
        return replace(norm, weight=norm.weight.to(self.dtype), bias=norm.bias.to(self.dtype))

    def _before(self, i: int, name: str) -> tuple[Norm | None, Float[Tensor, "position"]]:
        """Return the norm before attention or MLP with its divisors; a block with one norm has it before both."""
        module = self.anatomy.part(i, name) or self.anatomy.part(i, "ln1")
        stream = self.at(f"resid_pre.{i}") if name == "ln1" else self.entering(i)
        if module is None:
            return None, torch.ones(self.width).to(stream)
        norm = self._norm(module)
        return norm, norm.scale(stream)

    def _attention(self, i: int) -> Attention:
        w, s = self.model.weights, self.model.shape
        norm, scale = self._before(i, "ln1")
        pattern, out = self.at(f"pattern.{i}"), wide(w.o[i].detach())  # [head, d_head, d_model]
        out_bias, values = wide(w.o_bias[i].detach()), wide(w.v[i].detach())  # [kv_head, d_model, d_head]
        own = wide(w.v_bias[i].detach()) + (0 if norm is None else torch.einsum("d,gde->ge", norm.bias, values))
        own = own.repeat_interleave(s.n_heads // s.n_kv_heads, 0)
        constant = torch.einsum("hq,he,hed->qd", pattern.sum(-1), own, out) + out_bias
        factor = pattern.new_full((self.width,), self.anatomy.multiplier)
        module = self.anatomy.part(i, "ln1_post")
        if module is not None:
            post = self._norm(module)
            written = torch.einsum("qhe,hed->qd", self.at(f"z.{i}"), out) + out_bias
            factor = factor / post.scale(written)
            out, constant = post.centre(out) * post.weight, post.centre(constant) * post.weight
            constant = constant * factor[:, None] + self.anatomy.multiplier * post.bias
        else:
            constant = constant * factor[:, None]
        into_stream = values.mT.reshape(-1, s.d_model)
        into_stream = into_stream if norm is None else norm.folded(into_stream)
        return Attention(
            into_z=out.reshape(-1, s.d_model).T.contiguous(),
            into_stream=into_stream.contiguous(),
            pattern=pattern * factor[:, None] / scale,
            constant=constant,
        )
