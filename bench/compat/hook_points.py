"""Every hook point of TransformerLens 3.9 on seeded tiny models, raw and processed, as the reference of a test.

Run in an environment with TransformerLens 3.9:

    python -m bench.compat.hook_points tests/compat/reference/hook_points.json

Models are transformers' own classes with weights drawn here, the same in both packages; TransformerLens gets the
configuration that it would derive from the hub's, with these sizes.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
GATED = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 16}
GEMMA = {**GATED, "head_dim": 4, "sliding_window": 16, "query_pre_attn_scalar": 4}
SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
# name there, class, configuration, and what TransformerLens does not read off the configuration given here
SUBJECTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 32, "bos_token_id": 0,
        "eos_token_id": 0}),
    "EleutherAI/pythia-70m": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {
        **SIZES, "intermediate_size": 24, "max_position_embeddings": 16, "rotary_pct": 0.5}),
    "meta-llama/Llama-3.2-1B": ("LlamaForCausalLM", "LlamaConfig", GATED),
    "google/gemma-2-2b": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "google/gemma-3-1b-pt": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GEMMA, "layer_types": ["full_attention"] * 2}),
    "Qwen/Qwen2-0.5B": ("Qwen2ForCausalLM", "Qwen2Config", GATED),
    "Qwen/Qwen3-0.6B": ("Qwen3ForCausalLM", "Qwen3Config", {**GATED, "head_dim": 4}),
}  # fmt: skip


def subject(name: str) -> Any:
    """Return the tiny Hugging Face model of a name, every weight drawn anew."""
    import transformers

    kind, config, sizes = SUBJECTS[name]
    hf = getattr(transformers, kind)(getattr(transformers, config)(**sizes, attn_implementation="eager"))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in dict.fromkeys(hf.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=g) * 0.3 + (weight.ndim == 1) * weight)
    return hf.eval()


def prompt() -> torch.Tensor:
    """Return the token ids."""
    return torch.tensor([[0, 5, 9, 31, 5, 9]])


def loaded(name: str, processed: bool) -> Any:
    """Return the tiny model of a name as TransformerLens loads it."""
    import transformer_lens
    from transformer_lens import loading_from_pretrained as loading

    hf, convert = subject(name), loading.convert_hf_model_config
    c = hf.config
    sizes = {
        "d_model": 16, "d_head": 4, "n_heads": 4, "n_layers": 2, "n_ctx": 16, "d_vocab": 32, "eps":
        getattr(c, "rms_norm_eps", getattr(c, "layer_norm_eps", getattr(c, "layer_norm_epsilon", 1e-5))),
        "d_mlp": 64 if name == "gpt2" else 24,
    }  # fmt: skip
    if "pythia" in name:
        sizes |= {"rotary_dim": 2, "parallel_attn_mlp": True}
    elif name != "gpt2":
        base = c.rope_parameters.get("rope_theta") or c.rope_parameters["full_attention"]["rope_theta"]
        sizes |= {"n_key_value_heads": 2, "rotary_dim": 4, "rotary_base": base, "use_NTK_by_parts_rope": False}
    if "gemma" in name:
        sizes |= {"attn_scale": 2.0, "attn_types": ["global"] * 2, "use_local_attn": False, "window_size": 16}
    loading.convert_hf_model_config = lambda *_, **__: {**described(name), **sizes}
    try:
        return transformer_lens.HookedTransformer.from_pretrained(
            name, hf_model=hf, tokenizer=None, **({} if processed else dict.fromkeys(PROCESSING, False)), device="cpu"
        )
    finally:
        loading.convert_hf_model_config = convert


PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def described(name: str) -> dict[str, Any]:
    """Return what TransformerLens says of an architecture beside its sizes."""
    kind = SUBJECTS[name][0]
    rotary = {"normalization_type": "RMS", "positional_embedding_type": "rotary", "final_rms": True, "gated_mlp": True,
              "rotary_adjacent_pairs": False, "original_architecture": kind}  # fmt: skip
    gemma = {"act_fn": "gelu_pytorch_tanh", "use_normalization_before_and_after": True}
    return {
        "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN", "original_architecture": kind},
        "EleutherAI/pythia-70m": {
            "act_fn": "gelu", "normalization_type": "LN", "positional_embedding_type": "rotary",
            "rotary_adjacent_pairs": False, "original_architecture": kind},
        "meta-llama/Llama-3.2-1B": {**rotary, "act_fn": "silu"},
        "google/gemma-2-2b": {**rotary, **gemma, "attn_scores_soft_cap": 50.0, "output_logits_soft_cap": 30.0},
        "google/gemma-3-1b-pt": {**rotary, **gemma, "use_qk_norm": True},
        "Qwen/Qwen2-0.5B": {**rotary, "act_fn": "silu"},
        "Qwen/Qwen3-0.6B": {**rotary, "act_fn": "silu", "use_qk_norm": True},
    }[name]  # fmt: skip


# native models: what their configuration says beside sizes
NATIVE: dict[str, dict[str, Any]] = {
    "standard": {"act_fn": "gelu"},
    "attention only": {"attn_only": True, "positional_embedding_type": "shortformer", "normalization_type": None},
    "rotary": {"act_fn": "silu", "gated_mlp": True, "positional_embedding_type": "rotary", "normalization_type": "RMS",
               "n_key_value_heads": 2, "final_rms": True},
    "adjacent": {"act_fn": "gelu_new", "positional_embedding_type": "rotary", "rotary_dim": 2,
                 "rotary_adjacent_pairs": True, "parallel_attn_mlp": True, "normalization_type": "LNPre"},
    "solu": {"act_fn": "solu_ln", "init_mode": "xavier_uniform"},
    "algorithmic": {"act_fn": "relu", "normalization_type": None, "d_vocab_out": 7, "attention_dir": "bidirectional",
                    "init_mode": "kaiming_normal"},
    "local": {"act_fn": "relu", "use_local_attn": True, "window_size": 3, "attn_types": ["global", "local"],
              "scale_attn_by_inverse_layer_idx": True, "final_rms": True},
}  # fmt: skip


def native(name: str) -> dict[str, Any]:
    """Return the configuration of a native model."""
    return {"n_layers": 2, "d_model": 16, "n_ctx": 8, "d_head": 4, "n_heads": 4, "d_vocab": 32, "seed": 1,
            "device": "cpu", **NATIVE[name]}  # fmt: skip


def captured(model: Any) -> dict[str, torch.Tensor]:
    """Return logits, all activations and gradients of the loss with every switch on, and weights."""
    for switch in SWITCHES:
        if not (switch == "use_hook_mlp_in" and model.cfg.attn_only):
            getattr(model, f"set_{switch}")(True)
    narrow = model.cfg.d_vocab_out < model.cfg.d_vocab  # then tokens are no targets
    backward = {} if narrow else {"return_type": "loss", "incl_bwd": True}
    loss, cache = model.run_with_cache(prompt(), return_cache_object=False, **backward)
    mlp = () if model.cfg.attn_only else ("W_in", "W_out")
    names = ("W_Q", "W_K", "W_V", "W_O", "b_O", *mlp, "W_E", "W_U", "b_U")
    weights = {n: getattr(model, n).detach() for n in names}
    return {"loss": loss.detach(), "logits": model(prompt()).detach(), **cache, **weights}


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    """Return the shape, the largest size and three seeded random projections of each tensor."""
    out = {}
    for name, t in tensors.items():
        flat = t.detach().double().nan_to_num(neginf=-100.0).flatten()
        g = torch.Generator().manual_seed(len(flat))
        probes = torch.randn(3, len(flat), generator=g, dtype=torch.float64)
        out[name] = [list(t.shape), float(flat.abs().max()), (probes @ flat).tolist()]
    return out


def main() -> None:
    """Write the reference."""
    import transformer_lens

    out: dict[str, Any] = {"made with": f"transformer_lens {version('transformer_lens')}"}
    for name in SUBJECTS:
        for processed in (False, True):
            out[f"{name} {'processed' if processed else 'raw'}"] = digest(captured(loaded(name, processed)))
    for name in NATIVE:
        out[f"native {name}"] = digest(captured(transformer_lens.HookedTransformer(native(name))))
    text = json.dumps(out, separators=(",", ":"))
    Path(sys.argv[1]).write_text(text.replace("},", "},\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
