"""GGUF files of tiny models, written as llama.cpp's converter writes them: names, order of rows, fields, tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as tf

from tests.models.words import byte_level

D, H, KV, LAYERS = 64, 4, 2, 2
_SHARED: dict[str, Any] = {
    "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": H, "num_key_value_heads": KV,
    "intermediate_size": 96, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_EPS = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
_GEMMA = {**_SHARED, "head_dim": 32, "rms_norm_eps": 3e-3}
_FULL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 70000.0}
_LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32, "rope_theta": 500.0}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5000.0}

# name → (architecture of GGUF, configuration class, arguments)
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaConfig", {**_SHARED, "rope_parameters": _ROPE, "rms_norm_eps": 1e-3}),
    "llama_tied": ("llama", "LlamaConfig", {**_SHARED, "rope_parameters": _ROPE, "tie_word_embeddings": True}),
    "llama_3.1": ("llama", "LlamaConfig", {**_SHARED, "rope_parameters": _LLAMA3}),
    "qwen2": ("qwen2", "Qwen2Config", {**_SHARED, "rope_parameters": _ROPE}),
    "qwen2_yarn": ("qwen2", "Qwen2Config", {**_SHARED, "rope_parameters": _YARN}),
    "qwen3": ("qwen3", "Qwen3Config", {**_SHARED, "head_dim": 32, "rope_parameters": _ROPE}),
    "gemma2": ("gemma2", "Gemma2Config", {**_GEMMA, "rope_parameters": _ROPE, "sliding_window": 4,
                                          "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0,
                                          "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3", "Gemma3TextConfig", {**_GEMMA, "sliding_window": 4, "query_pre_attn_scalar": 32,
                                              "rope_parameters": {"full_attention": _FULL, "sliding_attention": _LOCAL},
                                              "num_hidden_layers": 6}),
    "gpt2": ("gpt2", "GPT2Config", {"n_embd": D, "n_layer": LAYERS, "n_head": H, "n_positions": 128, "n_ctx": 128,
                                    "layer_norm_epsilon": 1e-2, "bos_token_id": 0, "eos_token_id": 0}),
    "starcoder2": ("starcoder2", "Starcoder2Config", {**_SHARED, "rope_parameters": _ROPE, "norm_epsilon": 1e-2,
                                                      "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3moe", "Qwen3MoeConfig", {**_SHARED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                                 "moe_intermediate_size": 32, "norm_topk_prob": True,
                                                 "rope_parameters": _ROPE}),
    "stablelm": ("stablelm", "StableLmConfig", {**_SHARED, "layer_norm_eps": 1e-2,
                                                "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25}}),
    "falcon": ("falcon", "FalconConfig", {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": H,
                                          "multi_query": True, "parallel_attn": True, "layer_norm_epsilon": 1e-2,
                                          "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0}),
    "phi3": ("phi3", "Phi3Config", {**_SHARED, "rope_parameters": _ROPE, "pad_token_id": 0}),
}  # fmt: skip


def tiny(name: str) -> Any:
    """A model of one shape, with weights large enough that attention is not uniform."""
    _, kind, arguments = SHAPES[name]
    config = getattr(tf, kind)(vocab_size=len(byte_level()), **arguments)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = tf.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in hf.parameters():
                _ = p.add_(0.1 * torch.randn_like(p)) if p.ndim == 1 else p.mul_(4)
    return hf.requires_grad_(False).eval()


def written(hf: Any, path: Path, arch: str, stored: str = "F32", **fields: Any) -> Path:
    """A model as a GGUF file; `fields` replace what the header says, and a value of None leaves a field out."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**_fields(hf.config, arch), **fields}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_string(key, value)
    kind = gguf.GGMLQuantizationType[stored]
    for name, values in _tensors(hf, arch).items():
        if stored != "F32" and values.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _fields(c: Any, arch: str) -> dict[str, Any]:
    rope = getattr(c, "rope_parameters", None) or {}
    local, rope = rope.get("sliding_attention", {}), rope.get("full_attention", rope)
    eps = getattr(c, "rms_norm_eps", None)
    scaled = rope.get("rope_type") in ("linear", "yarn")
    own = {
        "context_length": c.max_position_embeddings,
        "block_count": c.num_hidden_layers,
        "embedding_length": c.hidden_size,
        "feed_forward_length": getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": getattr(c, "num_key_value_heads", None),
        "attention.key_length": getattr(c, "head_dim", None) if arch != "llama" else None,
        "attention.layer_norm_rms_epsilon": eps,
        "attention.layer_norm_epsilon": None
        if eps
        else next(e for n in _EPS if (e := getattr(c, n, None)) is not None),
        "expert_count": getattr(c, "num_experts", None),
        "expert_used_count": getattr(c, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(c, "moe_intermediate_size", None),
        "attention.sliding_window": getattr(c, "sliding_window", None),
        "attn_logit_softcapping": getattr(c, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(c, "final_logit_softcapping", None),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": local.get("rope_theta"),
        "rope.dimension_count": c.hidden_size // c.num_attention_heads if arch in ("llama", "phi3") else None,
        "rope.scaling.type": rope["rope_type"] if scaled else None,
        "rope.scaling.factor": rope["factor"] if scaled else None,
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings") if scaled else None,
    }
    vocabulary = sorted(byte_level().get_vocab().items(), key=lambda pair: pair[1])
    merges = re.findall(r'\[\s*"([^"]+)",\s*"([^"]+)"\s*\]', byte_level().backend_tokenizer.to_str())
    return {f"{arch}.{k}": v for k, v in own.items()} | {
        "general.name": "a tiny model",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [word for word, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if i == 0 else 1 for _, i in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


def _tensors(hf: Any, arch: str) -> dict[str, np.ndarray]:
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(number, hf.config.num_hidden_layers)
    found = {}
    for path, p in hf.named_parameters():  # tied weights once
        if "experts." in path:
            found |= _experts(path, p.detach())
            continue
        stem, _, end = path.rpartition(".")
        found[f"{names.get_name(stem)}.{end}"] = _turned(path, p.detach(), arch, hf.config).numpy()
    inner = getattr(hf.model, "rotary_emb", None) if hasattr(hf, "model") else None
    if inner is not None and inner.config.rope_parameters.get("rope_type") == "llama3":
        base = hf.config.rope_parameters["rope_theta"]
        plain = base ** -(torch.arange(0, D // H, 2) / (D // H))
        found["rope_freqs.weight"] = (plain / inner.inv_freq).float().numpy()
    return found


def _experts(path: str, w: torch.Tensor) -> dict[str, np.ndarray]:
    """The maps of all experts of one layer, gate and up apart."""
    block = f"blk.{path.split('.')[2]}.ffn_"
    if path.endswith("down_proj"):
        return {f"{block}down_exps.weight": w.numpy()}
    gate, up = w.chunk(2, dim=1)
    return {f"{block}gate_exps.weight": gate.contiguous().numpy(), f"{block}up_exps.weight": up.contiguous().numpy()}


def _turned(path: str, w: torch.Tensor, arch: str, c: Any) -> torch.Tensor:
    """A weight as llama.cpp stores it: rotary halves interleaved, Conv1D transposed, norms of Gemma with their one."""
    if arch == "llama" and re.search(r"[qk]_proj", path):
        heads = c.num_attention_heads if "q_proj" in path else c.num_key_value_heads
        return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape).contiguous()
    if arch == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight", path):
        return w.T.contiguous()
    return w + 1 if arch.startswith("gemma") and path.endswith("norm.weight") else w
