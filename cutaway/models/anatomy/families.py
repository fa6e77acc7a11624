"""Families: one row of data per architecture, and structural probing for those without a row.

A path names a module inside the block (or inside the root, for embeddings and the final norm). `a|b` means the first
of the two that exists; a missing optional module is simply absent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from cutaway.core.refuse import Refused

QKV = Literal["separate", "concat", "grouped", "unknown"]


@dataclass(frozen=True)
class Family:
    """Paths of the named places in one architecture.

    `qkv`: how W_Q, W_K, W_V lie in the weights: three modules; one, concatenated; one, grouped per key-value head as
    [kv_head, queries of the group + k + v, d_head]; or one in an unknown order. `parallel`: config keys that make
    attention and MLP read the same residual stream ("always" for families that always do). Without `ln1` attention and
    MLP read the raw stream and their outputs are normed (OLMo-2). `post_norm`: the residual stream itself is normed
    after each addition (BERT; OPT-350m, which `pre_norm` tells by a config key). `fixed_batch`: its attention is made
    for the number of rows it was called with, so that none can join later. `ssm`: a state-space layer, with its input
    projection (`gate_first`: the gate's half stands before x) and its output projection; it keeps no keys and values.
    """

    name: str
    root: str = "model"
    layers: str = "layers"
    embed: str = "embed_tokens"
    pos: str | None = None
    final: str | None = "norm"
    attn: str = "self_attn"
    o: str = "self_attn.o_proj"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    fused: str | None = None
    qkv: QKV = "separate"
    ln1: str | None = "input_layernorm"
    ln2: str | None = "post_attention_layernorm"
    ln1_post: str | None = None
    ln2_post: str | None = None
    mlp: str = "mlp"
    up: str = "mlp.up_proj"
    gate: str | None = "mlp.gate_proj"
    down: str = "mlp.down_proj"
    fused_gate: bool = False
    router: str | None = None
    ssm: str | None = None
    ssm_in: str | None = None
    ssm_out: str | None = None
    gate_first: bool = False
    parallel: tuple[str, ...] = ()
    post_norm: bool = False
    qk_norm: tuple[str, ...] = ()
    causal: bool = True
    adds_in_place: bool = False
    residual_multiplier: str | None = None
    fixed_batch: bool = False
    pre_norm: str | None = None
    probed: bool = False


_LLAMA = Family("llama")
_PLAIN_MLP: dict[str, Any] = {"gate": None}
_GPT2 = Family(
    "gpt2", root="transformer", layers="h", embed="wte", pos="wpe", final="ln_f", attn="attn", o="attn.c_proj",
    fused="attn.c_attn", qkv="concat", ln1="ln_1", ln2="ln_2", up="mlp.c_fc", gate=None, down="mlp.c_proj",
)  # fmt: skip
_NEOX = Family(
    "gpt_neox", root="gpt_neox", embed="embed_in", final="final_layer_norm", attn="attention", o="attention.dense",
    fused="attention.query_key_value", qkv="grouped", up="mlp.dense_h_to_4h", gate=None, down="mlp.dense_4h_to_h",
    parallel=("use_parallel_residual",),
)  # fmt: skip
_BLOOM = Family(
    "bloom", root="transformer", layers="h", embed="word_embeddings", final="ln_f", attn="self_attention",
    o="self_attention.dense", fused="self_attention.query_key_value", qkv="grouped", up="mlp.dense_h_to_4h", gate=None,
    down="mlp.dense_4h_to_h", fixed_batch=True,
)  # fmt: skip
_SANDWICH: dict[str, Any] = {
    "ln2": "pre_feedforward_layernorm",
    "ln1_post": "post_attention_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}
_OLMO2 = replace(
    _LLAMA, name="olmo2", ln1=None, ln2=None, ln1_post="post_attention_layernorm",
    ln2_post="post_feedforward_layernorm", qk_norm=("self_attn.q_norm",),
)  # fmt: skip
_PHI3 = replace(
    _LLAMA,
    name="phi3",
    fused="self_attn.qkv_proj",
    qkv="concat",
    up="mlp.gate_up_proj",
    gate="mlp.gate_up_proj",
    fused_gate=True,
)
_MOE: dict[str, Any] = {"router": "mlp.gate"}
_QWEN3 = replace(_LLAMA, name="qwen3", qk_norm=("self_attn.q_norm",))
_GLM = replace(_LLAMA, name="glm", up="mlp.gate_up_proj", gate="mlp.gate_up_proj", fused_gate=True)
_COHERE = replace(
    _LLAMA, name="cohere", ln2=None, parallel=("always",), qk_norm=("self_attn.q_norm",),
)  # fmt: skip
_FALCON = replace(
    _BLOOM, name="falcon", ln1="ln_attn|input_layernorm", ln2="ln_mlp|post_attention_layernorm",
    parallel=("parallel_attn", "new_decoder_architecture"), adds_in_place=True, fixed_batch=False,
)  # fmt: skip
_GPTJ = Family(
    "gptj", root="transformer", layers="h", embed="wte", final="ln_f", attn="attn", o="attn.out_proj", q="attn.q_proj",
    k="attn.k_proj", v="attn.v_proj", ln1="ln_1", ln2=None, up="mlp.fc_in", gate=None, down="mlp.fc_out",
    parallel=("always",),
)  # fmt: skip
_NEO = replace(
    _GPT2,
    name="gpt_neo",
    attn="attn.attention",
    o="attn.attention.out_proj",
    fused=None,
    qkv="separate",
    q="attn.attention.q_proj",
    k="attn.attention.k_proj",
    v="attn.attention.v_proj",
)
_OPT = Family(
    "opt", root="model.decoder", embed="project_in|embed_tokens", pos="embed_positions", final="final_layer_norm",
    o="self_attn.out_proj", pre_norm="do_layer_norm_before",
    ln1="self_attn_layer_norm", ln2="final_layer_norm", mlp="fc1", up="fc1", gate=None, down="fc2",
)  # fmt: skip
_BERT = Family(
    "bert", root="bert", layers="encoder.layer", embed="embeddings.word_embeddings",
    pos="embeddings.position_embeddings", final=None, attn="attention.self", o="attention.output.dense",
    q="attention.self.query", k="attention.self.key", v="attention.self.value", ln1=None, ln2=None,
    mlp="intermediate", up="intermediate.dense", gate=None, down="output.dense", post_norm=True, causal=False,
)  # fmt: skip
_MAMBA = Family(
    "mamba", root="backbone", embed="embeddings", final="norm_f", attn="", o="", q="", k="", v="", ln1="norm", ln2=None,
    mlp="", up="", gate=None, down="", ssm="mixer", ssm_in="mixer.in_proj", ssm_out="mixer.out_proj",
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, name="gpt_bigcode", fixed_batch=True),
    "gpt_neo": _NEO,
    "gptj": _GPTJ,
    "gpt_neox": _NEOX,
    "opt": _OPT,
    "bloom": _BLOOM,
    "falcon": _FALCON,
    "phi": replace(_LLAMA, name="phi", final="final_layernorm", o="self_attn.dense", ln2=None, up="mlp.fc1", gate=None,
                   down="mlp.fc2", parallel=("always",), qk_norm=("self_attn.q_layernorm",)),
    "phi3": _PHI3,
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, name="mistral"),
    "mixtral": replace(_LLAMA, name="mixtral", **_MOE),
    "qwen2": replace(_LLAMA, name="qwen2"),
    "qwen2_moe": replace(_LLAMA, name="qwen2_moe", **_MOE),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, name="qwen3_moe", **_MOE),
    "gemma": replace(_LLAMA, name="gemma"),
    "gemma2": replace(_LLAMA, name="gemma2", **_SANDWICH),
    "gemma3_text": replace(_LLAMA, name="gemma3_text", qk_norm=("self_attn.q_norm",), **_SANDWICH),
    "olmo": replace(_LLAMA, name="olmo"),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, name="olmo3"),
    "stablelm": replace(_LLAMA, name="stablelm", parallel=("use_parallel_residual",),
                        qk_norm=("self_attn.q_layernorm",)),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, name="cohere2"),
    "glm": _GLM,
    "glm4": replace(_GLM, name="glm4", ln1_post="post_self_attn_layernorm", ln2_post="post_mlp_layernorm"),
    "granite": replace(_LLAMA, name="granite", residual_multiplier="residual_multiplier"),
    "starcoder2": replace(_LLAMA, name="starcoder2", up="mlp.c_fc", gate=None, down="mlp.c_proj"),
    "smollm3": replace(_LLAMA, name="smollm3"),
    "bert": _BERT,
    "mamba": _MAMBA,
    "mamba2": replace(_MAMBA, name="mamba2", gate_first=True),
    "falcon_mamba": replace(_MAMBA, name="falcon_mamba"),
}  # fmt: skip


def reads_as_encoder(config: Any) -> bool:
    """Return True if a configuration is read as a bidirectional encoder."""
    row = FAMILIES.get(config.model_type)
    return row is not None and not row.causal and not getattr(config, "is_decoder", False)


def find(module: nn.Module, path: str | None) -> nn.Module | None:
    """Return the submodule at a path with `|` alternatives, or None."""
    return trace(module, path)[0]


Step = tuple[dict[str, nn.Module | None], str, nn.Module | None]  # (children of a module, a name, what it named)


def trace(module: nn.Module, path: str | None) -> tuple[nn.Module | None, list[Step]]:
    """Like `find`, with the steps looked up on the way: while they hold, so does the finding."""
    steps: list[Step] = []
    for alternative in (path or "").split("|"):
        found: Any = module if alternative else None
        for name in alternative.split("."):
            if found is None:
                break
            children = found.__dict__["_modules"]
            steps.append((children, name, children.get(name)))
            found = children.get(name) or getattr(found, name, None)
            found = found if isinstance(found, nn.Module) else None
        if found is not None:
            return found, steps
    return None, steps


def need(module: nn.Module, path: str | None, what: str) -> nn.Module:
    """Like `find`, for a module that must be there."""
    found = find(module, path) if path else module
    if found is None:
        raise Refused(f"{what} at {path!r}", f"{type(module).__name__} has no such module", "report the model's type")
    return found
