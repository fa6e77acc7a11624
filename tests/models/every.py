"""Tiny models of every architecture of transformers that continues text and has no family row: data and how to build.

Sizes are given by the names that configurations use for them, so that a new family needs a row in `OWN` only where that
is not enough. Every multiplier has an odd value, and weights are moved off their initial values, so that one that is
forgotten shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
import transformers as tf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cutaway.core.refuse import Refused
from cutaway.models.anatomy.families import FAMILIES
from cutaway.models.model import Model
from cutaway.models.self_check import CheckOutcome, disabled_sites, self_check

V, D, H, LAYERS = 160, 32, 4, 3

#: a size and the names it goes by
_NAMES: list[tuple[int, str]] = [
    (V, "vocab_size encoder_vocab_size vocab_size_per_layer_input"),
    (D, "hidden_size d_model n_embd dim_model emb_dim n_embed embedding_size word_embed_proj_dim lru_width"),
    (H, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
       "num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads swa_num_attention_heads "
       "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_heads attn_hidden_heads"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
    (1, "encoder_layers num_encoder_layers n_group topk_group n_shared_experts mamba_n_groups n_groups"),
    (2, "num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok moe_k moe_topk num_experts_per_token "
       "top_k_experts linear_num_key_heads index_n_heads swa_num_key_value_heads mamba_expand type_vocab_size"),
    (48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dff ffn_hidden_size n_inner d_inner "
        "mlp_hidden_size block_ff_dim dim_ff"),
    (16, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size q_lora_rank kv_lora_rank "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size router_hidden_size rel_extent"),
    (8, "head_dim kv_channels d_kv qk_nope_head_dim v_head_dim mamba_n_heads mamba_d_head mamba_num_heads "
       "mamba_head_dim hidden_size_per_layer_input laurel_rank linear_key_head_dim linear_value_head_dim "
       "index_head_dim index_topk swa_head_dim linear_head_dim dim_head attention_chunk_size o_lora_rank"),
    (6, "mamba_d_state ssm_state_size state_size"),
    (4, "qk_rope_head_dim sliding_window sliding_window_size attention_window_size mamba_d_conv mamba_chunk_size "
       "chunk_size rotary_dim hc_lowrank"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions mamba_d_ssm"),
]  # fmt: skip
SIZES = {name: size for size, names in _NAMES for name in names.split()}
#: multipliers, scales and caps, of which none is 1; and dense layers before sparse ones
ODD: dict[str, Any] = {
    "logit_scale": 0.3, "logits_scaling": 0.4, "lm_head_multiplier": 0.3, "embedding_multiplier": 1.7,
    "residual_multiplier": 0.4, "attention_multiplier": 0.3, "key_multiplier": 0.7, "scale_emb": 1.7,
    "scale_depth": 1.3, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "logits_soft_cap": 3.0,
    "attention_in_multiplier": 0.8, "attention_out_multiplier": 0.7, "ssm_in_multiplier": 0.8,
    "ssm_out_multiplier": 0.7, "mlp_multipliers": [0.7, 1.3], "routed_scaling_factor": 1.3,
    "logits_mup_width_multiplier": 3.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1,
}  # fmt: skip
_HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_MLA: dict[str, Any] = {"num_key_value_heads": H}
_DECODER: dict[str, Any] = {"num_hidden_layers": LAYERS}
#: what a family's configuration wants beside the sizes
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "glm4_moe_lite",
                     "glm_moe_dsa", "youtu"), _MLA),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _HYBRID),
    "bailing_hybrid": {**_HYBRID, **_MLA, "short_conv_kernel_size": 3},
    "bamba": {"attn_layer_indices": [1]},
    "bert-generation": {"is_decoder": True},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "bigbird_pegasus": {**_DECODER, "attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cpmant": {"prompt_length": 4, "position_bias_num_buckets": 8, "position_bias_max_distance": 16,
               "prompt_types": 4, "segment_types": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": D, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots3_note_text": {**_MLA, "moe_intermediate_size": 16, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
    "gemma3n_text": {"num_kv_shared_layers": 1, "activation_sparsity_pattern": [0.0] * 4, "num_hidden_layers": 4,
                     "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "enable_moe_block": False,
                    "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "inkling_text": {"log_scaling_n_floor": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_HYBRID, **_MLA},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {**_MLA, "num_layers": 2, "zero_expert_num": 2, "head_dim": 4},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "qwen4_exp_text": {**_HYBRID, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                       "indexer_budget": 8, "indexer_compress_ratio": 2},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "attention_head_size": 8,
                 "axial_pos_embds": False, "feed_forward_size": 48, "local_attn_chunk_length": 4,
                 "num_hidden_layers": 2},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24, "is_decoder": True},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20, "pronunciation_embed_dim": 8,
                 "shape_embed_dim": 8, "is_decoder": True},
    "xlstm": {"chunk_size": 16, "qk_dim_factor": 0.5, "num_heads": 2},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "n_mamba_heads": 2, "mamba_dt_rank": 4,
              "attention_hidden_size": 2 * D, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"], "n_mamba_heads": 8,
               "mamba_ngroups": 1},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
                     "whisper"), _DECODER),
    **{k: {"is_decoder": True} for k in ("camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "roberta",
                                         "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl")},
}  # fmt: skip
#: families that no tiny model is built of, and why
NOT_BUILT: dict[str, str] = {
    "blt": "bytes in patches: an encoder, a global model and a decoder, with no one list of blocks",
    "git": "its image encoder has no small size",
    "phi4_multimodal": "its encoders of images and sounds have no small size; its text is read as that of `phi3`",
    "gemma3n": "its image encoder is of another package (timm); `gemma3n_text` is the language model",
    "dots3_note": "its encoders have no small size; `dots3_note_text` is the language model",
    "qwen4_exp": "its configuration has no small size; `qwen4_exp_text` is the language model",
    "gemma4_assistant": "it drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "it drafts for another model, whose keys and values it reads",
    "musicgen": "it continues audio codes, in several codebooks at once",
    "musicgen_melody": "it continues audio codes, in several codebooks at once",
}
#: families without a row; one whose language model has a configuration of its own, in `text_config`, is built on it
KINDS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAMILIES))
_FC: dict[str, str] = {"o": "self_attn.out_proj", "mlp": "fc2"}
_BART: dict[str, str] = {"blocks": "model.decoder.layers", **_FC}
_POST: dict[str, str] = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
_SPARSE: dict[str, str] = {"mlp": "block_sparse_moe"}
#: where a family's blocks, attention, output projection and MLP are, read off its code by hand
PLACES: dict[str, dict[str, str]] = {
    "biogpt": {"blocks": "biogpt.layers", **_FC},
    "codegen": {"blocks": "transformer.h", "attn": "attn", "o": "attn.out_proj"},
    "ctrl": {"blocks": "transformer.h", "attn": "multi_head_attention", "o": "multi_head_attention.dense",
             "mlp": "ffn"},
    "exaone4": _POST, "flex_olmo": _POST,
    "falcon_h1": {"mlp": "feed_forward"}, "llama4_text": {"mlp": "feed_forward"},
    "gpt-sw3": {"blocks": "transformer.h", "attn": "attn", "o": "attn.c_proj"},
    "gpt_neox_japanese": {"blocks": "gpt_neox_japanese.layers", "attn": "attention", "o": "attention.dense"},
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoe_swa"), _SPARSE),
    "mpt": {"blocks": "transformer.blocks", "attn": "attn", "o": "attn.out_proj",
            "mlp": "ffn.down_proj"},
    "openai-gpt": {"blocks": "transformer.h", "attn": "attn", "o": "attn.c_proj"},
    "persimmon": {"o": "self_attn.dense"},
    "xglm": _FC,
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus",
                     "plbart", "trocr", "whisper"), _BART),
}  # fmt: skip


def place(kind: str, name: str) -> str:
    """The path of a family's blocks (in the model), attention, output projection or MLP (in the block)."""
    usual = {"blocks": "model.layers", "attn": "self_attn", "o": "self_attn.o_proj", "mlp": "mlp"}
    return PLACES.get(kind, {}).get(name) or usual[name]


def arguments(kind: str) -> dict[str, Any]:
    """What a family's configuration is called with."""
    known = {f.name for f in fields(CONFIG_MAPPING[kind])}
    return {k: v for k, v in (SIZES | ODD).items() if k in known} | OWN.get(kind, {})


def nested(kind: str) -> bool:
    """Whether a configuration holds that of its language model, beside others of images or sounds."""
    return "text_config" in {f.name for f in fields(CONFIG_MAPPING[kind])}


def build(kind: str) -> Any:
    """A tiny model with weights large enough that attention is not uniform, and perturbed norms and biases."""
    config = CONFIG_MAPPING[kind](**arguments(kind))
    with torch.device("meta"):
        meta = tf.AutoModelForCausalLM.from_config(config)
    if nested(kind):
        return meta  # encoders of images have no small size, and structure is enough to refuse or to read them
    size = sum(p.numel() for p in meta.parameters())
    assert size < 3e6, f"{kind} has {size / 1e6:.1f} million parameters: give its sizes in OWN"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = tf.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for p in hf.parameters():
                p.mul_(3.0) if p.ndim > 1 else p.add_(0.2 * torch.randn_like(p))
    return hf.requires_grad_(False)


@dataclass(frozen=True)
class Found:
    """What becomes of one family: a model with its wrong sites disabled, or why there is none."""

    model: Model | None
    outcomes: Sequence[CheckOutcome] = ()
    why: str = ""


@cache
def found(kind: str) -> Found:
    """Build a family's tiny model and check it as `load` does."""
    if kind in NOT_BUILT:
        return Found(None, why=f"not tried: {NOT_BUILT[kind]}")
    try:
        model = Model(build(kind), name=kind)
        if nested(kind):
            return Found(None, why="not tried: only its structure, which is read; its text part alone is swept")
        outcomes = self_check(model)
    except Refused as refusal:
        return Found(None, why=f"refused: {refusal.why}")
    model.disabled.update(disabled_sites(outcomes))
    return Found(model, outcomes)
