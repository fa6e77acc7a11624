"""The native model: components with TransformerLens' parameter names, shapes and hook points, trainable."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cutaway.compat.transformer_lens import utils
from cutaway.compat.transformer_lens.config import HookedTransformerConfig as Config
from cutaway.compat.transformer_lens.factored_matrix import Circuits
from cutaway.compat.transformer_lens.hook_points import HookPoint
from cutaway.core.refuse import Refused


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return an activation function by its name in transformers, or SoLU.

    Raises:
        Refused: no such function.
    """
    from transformers.activations import ACT2FN

    if name in ("solu", "solu_ln"):
        return lambda x: x * F.softmax(x, dim=-1)
    if name not in ACT2FN:
        raise Refused(f"act_fn={name!r}", "it is not known", f"use solu, solu_ln, or one of {', '.join(ACT2FN)}")
    return ACT2FN[name]


Module: Any = nn.Module  # components are made by name, which types cannot follow


class Norm(Module):
    """A norm: it centres unless `rms`, and has weights unless `pre`."""

    def __init__(self, cfg: Config, length: int | None = None, rms: bool = False, pre: bool = False):
        super().__init__()
        self.cfg, self.eps, self.rms, self.pre = cfg, cfg.eps, rms, pre
        if not pre:
            self.w = nn.Parameter(torch.ones(length or cfg.d_model, dtype=cfg.dtype))
            if not rms:
                self.b = nn.Parameter(torch.zeros(length or cfg.d_model, dtype=cfg.dtype))
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        """Norm each vector; its divisor and the normed vector, before weights, are hooked."""
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        x = x if self.rms else x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        x = self.hook_normalized(x / scale).to(self.cfg.dtype)
        return x if self.pre else x * self.w if self.rms else x * self.w + self.b


def norm(cfg: Config, final: bool = False, length: int | None = None) -> nn.Module:
    """Make the norm that a configuration asks for; an identity if it asks for none."""
    kind = cfg.normalization_type
    if kind is None:
        return nn.Identity()
    if kind not in ("LN", "LNPre", "RMS", "RMSPre"):
        raise ValueError(f"Invalid normalization_type passed in {kind}")
    return Norm(cfg, length, kind.startswith("RMS") or (final and cfg.final_rms), kind.endswith("Pre"))


LayerNorm, LayerNormPre = Norm, partial(Norm, pre=True)
RMSNorm, RMSNormPre = partial(Norm, rms=True), partial(Norm, rms=True, pre=True)


class Embed(Module):
    """The embedding W_E [d_vocab d_model]."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model, dtype=cfg.dtype))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the rows of the tokens."""
        return self.W_E[tokens, :]


class PosEmbed(Module):
    """Learned absolute positions W_pos [n_ctx d_model]."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_model, dtype=cfg.dtype))

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the rows of the positions; those of padding are zero."""
        if attention_mask is None:
            at = torch.arange(past_kv_pos_offset, past_kv_pos_offset + tokens.shape[-1], device=self.W_pos.device)
            return self.W_pos[at].repeat(tokens.shape[0], 1, 1)
        real = attention_mask[:, past_kv_pos_offset:].bool()
        return torch.where(real.unsqueeze(-1), self.W_pos[offset_positions(past_kv_pos_offset, attention_mask)], 0)


class Unembed(Module):
    """The unembedding W_U [d_model d_vocab_out] and b_U."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.W_U = nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab_out, dtype=cfg.dtype))
        self.b_U = nn.Parameter(torch.zeros(cfg.d_vocab_out, dtype=cfg.dtype))
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    def forward(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab_out"]:
        """Return the logits."""
        return self.hook_out(F.linear(self.hook_in(residual), self.W_U.T, self.b_U))


class Attention(Circuits, Module):
    """Attention with W_Q, W_K, W_V [head d_model d_head], W_O [head d_head d_model] and their biases."""

    def __init__(self, cfg: Config | dict[str, Any], attn_type: str = "global", layer_id: int | None = None):
        super().__init__()
        cfg = Config.unwrap(cfg)
        self.cfg, self.attn_type, self.layer_id = cfg, attn_type, layer_id
        h, d, e, kv = cfg.n_heads, cfg.d_model, cfg.d_head, cfg.n_key_value_heads or cfg.n_heads
        self.group = h // kv
        own = "" if cfg.n_key_value_heads is None else "_"  # W_K is a property where heads share keys
        shapes = {"W_Q": (h, d, e), "W_O": (h, e, d), "b_Q": (h, e), "b_O": (d,)}  # in their order there
        shapes |= {f"{own}W_{c}": (kv, d, e) for c in "KV"} | {f"{own}b_{c}": (kv, e) for c in "KV"}
        for name, shape in shapes.items():
            made = torch.zeros if "b_" in name else torch.empty
            setattr(self, name, nn.Parameter(made(*shape, dtype=cfg.dtype)))
        if cfg.use_qk_norm:
            self.q_norm, self.k_norm = RMSNorm(cfg, e), RMSNorm(cfg, e)
        self.register_buffer("mask", torch.empty((0, 0), dtype=torch.bool))  # of old files; built for each forward
        self.register_buffer("IGNORE", torch.tensor(-torch.inf))
        self.attn_scale = cfg.attn_scale if cfg.use_attn_scale else 1.0
        if cfg.scale_attn_by_inverse_layer_idx:
            self.attn_scale *= int(layer_id or 0) + 1
        names = ["k", "q", "v", "z", "attn_scores", "pattern", "result"]
        if cfg.positional_embedding_type == "rotary":
            names += ["rot_k", "rot_q"]
            sin, cos = rotation(cfg)
            self.register_buffer("rotary_sin", sin)
            self.register_buffer("rotary_cos", cos)
        for name in names:
            setattr(self, f"hook_{name}", HookPoint())

    def __getattr__(self, name: str) -> Any:
        if name in ("W_K", "W_V", "b_K", "b_V") and f"_{name}" in self._parameters:
            return self._parameters[f"_{name}"].repeat_interleave(self.group, 0)  # type: ignore[union-attr]
        return super().__getattr__(name)

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch kv_pos *kv_head d_model"],
        value_input: Float[Tensor, "batch kv_pos *kv_head d_model"],
        past_kv_cache_entry: Any = None,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what the heads write, b_O included."""
        shared = self.cfg.n_key_value_heads is not None and not self.cfg.ungroup_grouped_query_attention
        w_k, w_v, b_k, b_v = (getattr(self, f"_{n}" if shared else n) for n in ("W_K", "W_V", "b_K", "b_V"))
        q = self.hook_q(project(query_input, self.W_Q, self.b_Q))
        k = self.hook_k(project(key_input, w_k, b_k))
        v = self.hook_v(project(value_input, w_v, b_v))
        if self.cfg.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        past = 0
        if past_kv_cache_entry is not None:
            past = past_kv_cache_entry.past_keys.shape[1]
            k, v = past_kv_cache_entry.append(k, v)
        if self.cfg.positional_embedding_type == "rotary":
            q = self.hook_rot_q(self.apply_rotary(q, past, attention_mask))
            k = self.hook_rot_k(self.apply_rotary(k, 0, attention_mask))
        k, v = (x.repeat_interleave(self.group, 2) if x.shape[2] != q.shape[2] else x for x in (k, v))
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / self.attn_scale
        if (cap := self.cfg.attn_scores_soft_cap) > 0:
            scores = cap * torch.tanh(scores / cap)
        if self.cfg.positional_embedding_type == "alibi":
            scores = scores + alibi(self.cfg.n_heads, scores.shape[-1], scores)[:, -scores.shape[-2] :]
        if self.cfg.attention_dir == "causal":
            scores = self.apply_causal_mask(scores, past, attention_mask)
        pattern = F.softmax(self.hook_attn_scores(scores), dim=-1)
        pattern = self.hook_pattern(torch.where(torch.isnan(pattern), torch.zeros_like(pattern), pattern))
        z = self.hook_z(torch.einsum("bhqk,bkhe->bqhe", pattern.to(v.dtype), v))
        if self.cfg.use_attn_result:
            return self.hook_result(torch.einsum("bqhe,hed->bqhd", z, self.W_O)).sum(2) + self.b_O
        return F.linear(z.flatten(2), self.W_O.flatten(0, 1).T, self.b_O)

    def apply_causal_mask(self, attn_scores, past_kv_pos_offset=0, attention_mask=None) -> Tensor:
        """Put −∞ where a query may not look [batch head pos key]: behind itself, beyond a local window, at padding."""
        queries, keys = attn_scores.shape[-2:]
        at = torch.arange(keys, device=attn_scores.device)
        ahead = at[None, :] - at[past_kv_pos_offset : past_kv_pos_offset + queries, None]
        seen = ((ahead <= 0) & (ahead > -int(self.cfg.window_size or 0)) if self.attn_type == "local" else ahead <= 0)[
            None, None
        ]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, :].bool()
        return torch.where(seen, attn_scores, self.IGNORE)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}mask", None)
        state_dict[f"{prefix}mask"] = self.mask
        super()._load_from_state_dict(state_dict, prefix, *args)

    def apply_rotary(
        self, x: Float[Tensor, "batch pos head d_head"], past: int = 0, attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Rotate the first rotary_dim dimensions by the position."""
        n = int(self.cfg.rotary_dim or 0)
        turned, kept = x[..., :n], x[..., n:]
        if attention_mask is None:
            at: Any = torch.arange(past, past + x.shape[1], device=x.device)[None]
        else:
            at = offset_positions(past, attention_mask)
        cos, sin = self.rotary_cos[at, None, :], self.rotary_sin[at, None, :]
        return torch.cat([turned * cos + self.rotate_every_two(turned) * sin, kept], dim=-1)

    def rotate_every_two(self, x: Float[Tensor, "... rotary_dim"]) -> Float[Tensor, "... rotary_dim"]:
        """Map each pair (a, b) to (−b, a)."""
        if self.cfg.rotary_adjacent_pairs:
            return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([-b, a], dim=-1)


def project(
    x: Float[Tensor, "batch pos *head d_model"],
    w: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """Map one input for all heads, or one for each, through W and its bias."""
    if x.ndim == 3:
        return F.linear(x, w.transpose(1, 2).flatten(0, 1), b.flatten()).unflatten(-1, b.shape)
    return torch.einsum("bphd,hde->bphe", x, w) + b


def offset_positions(past: int, attention_mask: Int[Tensor, "batch offset_pos"]) -> Int[Tensor, "batch pos"]:
    """Number the real tokens of each row from 0, behind `past` columns."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, past:]


def rotation(cfg: Config) -> tuple[Float[Tensor, "n_ctx rotary_dim"], Float[Tensor, "n_ctx rotary_dim"]]:
    """Return sine and cosine of each position's angles."""
    wide, n = torch.float64 if cfg.dtype == torch.float64 else torch.float32, int(cfg.rotary_dim or 0)
    freq = cfg.rotary_base ** (torch.arange(n // 2, dtype=wide) / (n / 2))
    freq = freq.repeat_interleave(2) if cfg.rotary_adjacent_pairs else freq.repeat(2)
    angles = torch.arange(cfg.n_ctx, dtype=wide)[:, None] / freq[None, :]
    return torch.sin(angles).to(cfg.dtype), torch.cos(angles).to(cfg.dtype)


def alibi(heads: int, keys: int, like: Tensor) -> Float[Tensor, "head key key"]:
    """Return the biases of attention with linear biases (Press et al. 2022)."""
    at = torch.arange(keys, device=like.device)
    steps = (2.0 ** (-8 / heads)) ** torch.arange(1, heads + 1, device=like.device)
    return (steps[:, None, None] * (at[None, :] - at[:, None]).clamp_max(0)).to(like.dtype)


GroupedQueryAttention = Attention  # one class: heads share keys where the configuration says so


class MLP(Module):
    """An MLP with W_in [d_model d_mlp] and W_out [d_mlp d_model], and W_gate where it is gated."""

    def __init__(self, cfg: Config | dict[str, Any]):
        super().__init__()
        cfg = Config.unwrap(cfg)
        self.cfg, self.act_fn = cfg, activation(str(cfg.act_fn))
        d, n = cfg.d_model, int(cfg.d_mlp or 0)
        for ends, rows, columns in (("in", d, n), ("out", n, d)):
            setattr(self, f"W_{ends}", nn.Parameter(torch.empty(rows, columns, dtype=cfg.dtype)))
            setattr(self, f"b_{ends}", nn.Parameter(torch.zeros(columns, dtype=cfg.dtype)))
        if cfg.gated_mlp:
            self.W_gate = nn.Parameter(torch.empty(d, n, dtype=cfg.dtype))
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()
        if cfg.gated_mlp:
            self.hook_pre_linear = HookPoint()
        if cfg.is_layer_norm_activation():
            self.hook_mid, self.ln = HookPoint(), norm(cfg, length=n)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what the neurons write, b_out included."""
        if self.cfg.gated_mlp:
            post = self.act_fn(self.hook_pre(x @ self.W_gate)) * self.hook_pre_linear(x @ self.W_in) + self.b_in
        else:
            post = self.act_fn(self.hook_pre(F.linear(x, self.W_in.T, self.b_in)))
            if self.cfg.is_layer_norm_activation():
                post = self.ln(self.hook_mid(post))
        return F.linear(self.hook_post(post), self.W_out.T, self.b_out)


class TransformerBlock(Module):
    """A block: norm, attention, norm, MLP, each added to the stream."""

    def __init__(self, cfg: Config, block_index: int):
        super().__init__()
        self.cfg, self.ln1 = cfg, norm(cfg)
        local = cfg.attn_types[block_index] if cfg.use_local_attn and cfg.attn_types else "global"
        self.attn = Attention(cfg, local, block_index)
        if not cfg.attn_only:
            self.ln2, self.mlp = norm(cfg), MLP(cfg)
        for name in block_points(cfg):
            setattr(self, f"hook_{name}", HookPoint())

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        shortformer_pos_embed: Float[Tensor, "batch pos d_model"] | None = None,
        past_kv_cache_entry: Any = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the stream behind the block."""
        cfg, added = self.cfg, shortformer_pos_embed
        resid_pre = self.hook_resid_pre(resid_pre)
        kv = cfg.n_heads if cfg.ungroup_grouped_query_attention else cfg.n_key_value_heads or cfg.n_heads
        inputs = [resid_pre] * 3
        if cfg.use_attn_in:
            inputs = [self.hook_attn_in(utils.repeat_along_head_dimension(resid_pre, cfg.n_heads))] * 3
        if cfg.use_split_qkv_input:
            points = zip((self.hook_q_input, self.hook_k_input, self.hook_v_input), (cfg.n_heads, kv, kv), strict=True)
            inputs = [point(utils.repeat_along_head_dimension(resid_pre, n)) for point, n in points]
        if added is not None and inputs[0].ndim == 4:
            added = utils.repeat_along_head_dimension(added, cfg.n_heads)
        q, k, v = (self.ln1(x) for x in inputs)
        if added is not None:
            q, k = q + added, k + added
        attn_out = self.hook_attn_out(self.attn(q, k, v, past_kv_cache_entry, attention_mask))
        if cfg.attn_only:
            return self.hook_resid_post(resid_pre + attn_out)
        if cfg.parallel_attn_mlp:
            return self.hook_resid_post(resid_pre + attn_out + self._mlp(resid_pre))
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        return self.hook_resid_post(resid_mid + self._mlp(resid_mid))

    def _mlp(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(x.clone()) if self.cfg.use_hook_mlp_in else x)))


def block_points(cfg: Config) -> list[str]:
    """Return the names of a block's own hook points."""
    middle = [] if cfg.attn_only or cfg.parallel_attn_mlp else ["resid_mid"]
    return [
        "attn_in",
        "q_input",
        "k_input",
        "v_input",
        "mlp_in",
        "attn_out",
        "mlp_out",
        "resid_pre",
        *middle,
        "resid_post",
    ]


def initialise(model: nn.Module, cfg: Config) -> None:
    """Draw all W_ parameters, in TransformerLens' order and distributions."""
    if cfg.seed is not None:
        torch.manual_seed(cfg.seed)
    for name, w in model.named_parameters():
        if "W_" not in name:
            continue
        if cfg.init_mode.startswith(("xavier", "kaiming")):
            getattr(utils, f"init_{cfg.init_mode}_")(w, gain=cfg.initializer_range)
        elif cfg.init_mode == "muP":
            nn.init.normal_(w, std=1.0 if "embed" in name else utils.calc_fan_in_and_fan_out(w)[0] ** -0.5)
        else:
            nn.init.normal_(w, std=cfg.initializer_range)
