"""circuit-tracer's replacement model of a saved transformers model and a folder of transcoders, without any hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def replacement_model(folder: Path, transcoders: Path) -> Any:
    """The model with its weights as they are, in eager attention."""
    import torch
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from transformer_lens import HookedTransformerConfig
    from transformer_lens import loading_from_pretrained as loading
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    plain = folder.parent / "model"  # a name that does not call a published model to mind, which would be taken for it
    plain.unlink(missing_ok=True)
    plain.symlink_to(folder, target_is_directory=True)
    if hf.config.model_type == "gemma2":
        published = loading.convert_hf_model_config("google/gemma-2-2b")
        config = HookedTransformerConfig.from_dict(gemma2(published, hf.config))
    else:
        config = loading.get_pretrained_model_config(str(plain), fold_ln=False, device="cpu")
    weights = loading.get_pretrained_state_dict(str(plain), config, hf)
    model: Any = TransformerLensReplacementModel(config, tokenizer=PreTrainedTokenizerFast.from_pretrained(folder))
    as_they_are = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    model.load_and_process_state_dict(weights, **dict.fromkeys(as_they_are, False))
    model._configure_replacement_model(loaded(transcoders, torch.device("cpu")))
    return model


def gemma2(published: dict[str, Any], config: Any) -> dict[str, Any]:
    """The configuration that TransformerLens has for a published Gemma 2, with the sizes of another."""
    sizes = {
        "d_model": config.hidden_size, "d_head": config.head_dim, "n_heads": config.num_attention_heads,
        "d_mlp": config.intermediate_size, "n_layers": config.num_hidden_layers, "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings, "n_key_value_heads": config.num_key_value_heads,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        "attn_scale": config.query_pre_attn_scalar**0.5, "eps": config.rms_norm_eps,
    }  # fmt: skip
    return published | sizes | {"device": "cpu", "model_name": "gemma-2", "init_weights": False}


def loaded(folder: Path, device: Any) -> Any:
    """A set of transcoders, or a cross-layer one, from its folder."""
    import torch
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    config = json.loads((folder / "config.yaml").read_text("utf-8"))
    hooks = {name: config[name] for name in ("feature_input_hook", "feature_output_hook")}
    given = {
        **hooks,
        "device": device,
        "dtype": torch.float32,
        "lazy_encoder": False,
        "lazy_decoder": False,
        "scan": "random",
    }
    if config["model_kind"] == "cross_layer_transcoder":
        return load_clt(str(folder), **given)
    files = sorted(folder.glob("layer_*.safetensors"), key=lambda file: int(file.stem.split("_")[1]))
    return load_transcoder_set({i: str(file) for i, file in enumerate(files)}, **given)
