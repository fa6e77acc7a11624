"""Tiny seeded models of every family and every attention kind, made from transformers' own configurations."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

D, H, LAYERS, V = 32, 4, 3, 101

_COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {**_COMMON, "num_key_value_heads": 2}
_MQA = {**_COMMON, "num_key_value_heads": 1}
_GEMMA = {**_GQA, "head_dim": 12}
_MOE = {**_GQA, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}

# name -> (configuration class, arguments). The name says what is special about the row.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": H, "n_positions": 64}),
    "gpt_neo": (
        "GPTNeoConfig",
        {"vocab_size": V, "hidden_size": D, "num_layers": 4, "num_heads": H, "max_position_embeddings": 64,
         "attention_types": [[["global", "local"], 2]], "window_size": 4},
    ),
    "gptj": ("GPTJConfig", {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": H, "n_positions": 64,
                            "rotary_dim": 4}),
    "gpt_neox_parallel": ("GPTNeoXConfig", {**_COMMON, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", {**_COMMON, "use_parallel_residual": False}),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": D}),
    "bloom": ("BloomConfig", {"vocab_size": V, "hidden_size": D, "n_layer": LAYERS, "n_head": H}),
    "phi": ("PhiConfig", _COMMON),
    "phi3": ("Phi3Config", _GQA),
    "llama": ("LlamaConfig", _COMMON),
    "llama_gqa": ("LlamaConfig", _GQA),
    "llama_mqa_bias_tied": ("LlamaConfig", {**_MQA, "attention_bias": True, "mlp_bias": True,
                                            "tie_word_embeddings": True}),
    "mistral_window": ("MistralConfig", {**_GQA, "sliding_window": 4}),
    "mixtral": ("MixtralConfig", {**_GQA, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", _GQA),
    "qwen2_moe": ("Qwen2MoeConfig", {**_MOE, "num_experts": 4, "mlp_only_layers": [0]}),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 12}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MOE, "num_experts": 4, "head_dim": 8}),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2Config", {**_GEMMA, "sliding_window": 4, "attn_logit_softcapping": 5.0,
                                "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "sliding_window": 4}),
    "olmo": ("OlmoConfig", _GQA),
    "olmo2": ("Olmo2Config", _GQA),
    "olmo3": ("Olmo3Config", {**_GQA, "sliding_window": 4}),
    "falcon_7b": ("FalconConfig", {**_COMMON, "multi_query": True, "parallel_attn": True,
                                   "new_decoder_architecture": False}),
    "falcon_40b": ("FalconConfig", {**_COMMON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon_alibi": (
        "FalconConfig",
        {**_COMMON, "alibi": True, "multi_query": False, "parallel_attn": False,
         "new_decoder_architecture": False, "bias": True},
    ),
    "stablelm": ("StableLmConfig", _GQA),
    "stablelm_parallel": ("StableLmConfig", {**_GQA, "use_parallel_residual": True, "qk_layernorm": True}),
    "cohere": ("CohereConfig", {**_GQA, "use_qk_norm": True, "logit_scale": 0.5}),
    "cohere2": ("Cohere2Config", {**_GQA, "sliding_window": 4, "logit_scale": 0.5}),
    "glm": ("GlmConfig", {**_GQA, "head_dim": 8}),
    "glm4": ("Glm4Config", {**_GQA, "head_dim": 8}),
    "granite": (
        "GraniteConfig",
        {**_GQA, "residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
         "attention_multiplier": 0.2},
    ),
    "starcoder2": ("Starcoder2Config", _GQA),
    "smollm3": ("SmolLM3Config", _GQA),
    "gpt_bigcode": ("GPTBigCodeConfig", {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": H,
                                         "n_positions": 64, "multi_query": True}),
    "bert": ("BertConfig", {**_COMMON}),
}  # fmt: skip

_SSM: dict[str, Any] = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "state_size": 6,
                        "pad_token_id": 0}  # fmt: skip
# models without attention, with tests of their own
STATE_SPACE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", _SSM),
    "mamba2": ("Mamba2Config", {**_SSM, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 5}),
    "falcon_mamba": ("FalconMambaConfig", _SSM),
}


def build(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 3.0, attention: str | None = None
) -> Any:
    """A tiny model with weights large enough that attention is not uniform, and perturbed norms and biases."""
    kind, arguments = (CONFIGS | STATE_SPACE)[name]
    config = getattr(tf, kind)(**arguments)
    auto = tf.AutoModelForMaskedLM if name == "bert" else tf.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = auto.from_config(config, **({"attn_implementation": attention} if attention else {}))
        with torch.no_grad():
            for p in hf.parameters():
                if p.ndim == 1:
                    p.add_(0.2 * torch.randn_like(p))
                else:
                    p.mul_(spread)
    return hf.to(dtype).eval()
