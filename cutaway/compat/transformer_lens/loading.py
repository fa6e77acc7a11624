"""Loading: a name, a folder or a live model as a house model that is one's own, and its configuration."""

from __future__ import annotations

import copy
from typing import Any

import torch

import cutaway
from cutaway.compat import MODELS
from cutaway.compat.aliases import NAMES
from cutaway.compat.transformer_lens.config import HookedTransformerConfig as Config
from cutaway.compat.transformer_lens.native_files import get_checkpoint_labels
from cutaway.core.refuse import Refused
from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.model import Model

_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")  # of configurations, the first that is there


def own_model(
    name: Any, hf_model: Any = None, tokenizer: Any = None, dtype: Any = None, device: Any = None, **_: Any
) -> Model:
    """Return a house model whose weights are a copy of its own.

    Raises:
        Refused: the name is not known here, or cannot be fetched.
    """
    source = hf_model if hf_model is not None else MODELS.get(name, name)
    if isinstance(source, Model):
        source, tokenizer = source.hf, tokenizer or source.tokenizer
    if isinstance(source, torch.nn.Module):
        hf = copy.deepcopy(source)
        model = cutaway.load(hf if dtype is None else hf.to(dtype), tokenizer=tokenizer, name=str(name))
        if device is not None:
            model.hf.to(device)
    else:
        model = cutaway.load(_hub_name(str(source)), tokenizer=tokenizer, dtype=dtype, device=device)
    model.hf.requires_grad_(True)
    return model


def _hub_name(name: str) -> str:
    owner = next((owner for start, owner in NAMES["owners"].items() if name.startswith(start) and "/" not in name), "")
    return NAMES["models"].get(name, owner + name)


#: models that TransformerLens gives no beginning of text unless they are asked to
WITHOUT_BOS = {f"{name}ForCausalLM" for name in ("GPTNeoX", "Bloom", "Qwen2", "Qwen3", "Phi")} | {"QWenLMHeadModel"}


def configuration(model: Model, name: str, **given: Any) -> Config:
    """Return the configuration that describes a house model.

    Raises:
        Refused: a model without attention, or one whose norms stand behind its layers.
    """
    a, s, hf = model.anatomy, model.shape, model.hf.config
    given.setdefault("default_prepend_bos", type(model.hf).__name__ not in WITHOUT_BOS)
    if not s.n_heads or a.family.post_norm:
        why = "it has no attention heads" if not s.n_heads else "it is an encoder, or norms the stream itself"
        raise Refused(f"HookedTransformer of {a.family.name}", why, "read it through cutaway.load")
    ln1 = a.part(0, "ln1") or a.part(0, "ln1_post")
    norm = a.norm(ln1) if ln1 is not None else None
    rope = getattr(hf, "rope_parameters", None) or {}
    positions = "standard" if a.top("pos") is not None else "rotary" if rope else "alibi"
    share = float(rope.get("partial_rotary_factor", None) or getattr(hf, "rotary_pct", None) or 1.0)
    act = next((v for n in _ACTIVATIONS if isinstance(v := getattr(hf, n, None), str)), "gelu")
    scalar = getattr(hf, "query_pre_attn_scalar", None)
    kv = None if s.n_kv_heads == s.n_heads else s.n_kv_heads
    return Config(
        n_layers=s.n_layers,
        d_model=s.d_model,
        n_ctx=min(s.context, 1 << 20),
        d_head=s.d_head,
        n_heads=s.n_heads,
        d_mlp=s.d_mlp,
        d_vocab=s.d_vocab,
        model_name=_hub_name(name).split("/")[-1],
        act_fn=act,
        eps=norm.eps if norm else 1e-5,
        normalization_type="LN" if norm is not None and norm.centred else "RMS",
        device=str(model.device),
        positional_embedding_type=positions,
        n_key_value_heads=kv,
        dtype=model.dtype,
        rotary_dim=int(share * s.d_head) if positions == "rotary" else None,
        rotary_base=theta if isinstance(theta := rope.get("rope_theta"), float) else 10000,
        gated_mlp=a.part(0, "gate") is not None,
        parallel_attn_mlp=a.parallel,
        original_architecture=type(model.hf).__name__,
        tokenizer_name=getattr(model.tokenizer, "name_or_path", None),
        init_weights=False,
        attn_scale=float(scalar) ** 0.5 if scalar else -1.0,
        use_normalization_before_and_after=a.part(0, "ln1_post") is not None and a.part(0, "ln1") is not None,
        output_logits_soft_cap=float(unembedding(a).cap or -1.0),
        attn_scores_soft_cap=float(getattr(hf, "attn_logit_softcapping", None) or -1.0),
        **given,
    )


def get_official_model_name(model_name: str) -> str:
    """Return the hub's name of a short name, or the folder that stands for it."""
    return MODELS.get(model_name, _hub_name(model_name))


def get_pretrained_model_config(
    model_name: str, default_prepend_bos: bool = True, device: Any = None, **_: Any
) -> Config:
    """Return the configuration of a model of the hub or a folder, without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    official = get_official_model_name(model_name)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(official))
    cfg = configuration(Model(hf, None, official), model_name, default_prepend_bos=default_prepend_bos)
    cfg.tokenizer_name, cfg.device = official, device or "cpu"
    return cfg


__all__ = ["get_checkpoint_labels", "get_official_model_name", "get_pretrained_model_config"]
