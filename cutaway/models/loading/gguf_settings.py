"""Settings of a GGUF file that transformers leaves at its own defaults, written into the configuration.

Most change no shape, so that a wrong one would go unnoticed: epsilons, rotary bases and their scaling, soft caps,
windows, the number of active experts, the scale of Gemma's attention. A wrong width of experts would only be refused.
"""

from __future__ import annotations

from typing import Any

from cutaway.core.refuse import Refused
from cutaway.models.loading.gguf_header import Header

# key of the file → names that configurations have for it
_SETTINGS: dict[str, tuple[str, ...]] = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.sliding_window": ("sliding_window",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "attention.key_length": ("head_dim",),
}
# llama.cpp tells these by their number of layers: their attention is scaled by the width of the model per head
_27B = {"gemma2": 46, "gemma3": 62}


def complete(config: Any, header: Header) -> None:
    """Set in a configuration what the file says and transformers did not take over.

    Raises:
        Refused: a scaling of rotary embeddings that transformers does not know.
    """
    for key, names in _SETTINGS.items():
        value, name = header.of(key), next((n for n in names if hasattr(config, n)), None)
        if name is not None and isinstance(value, int | float) and getattr(config, name) != value:
            setattr(config, name, value)
    if header.architecture in _27B:
        large = header.of("block_count") == _27B[header.architecture]
        per_head = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = per_head if large else config.head_dim
    rope: Any = getattr(config, "rope_parameters", None)
    if rope is not None:
        local = rope.get("sliding_attention")
        if local is not None and (base := header.of("rope.freq_base_swa")):
            local["rope_theta"] = base
        rope = rope.get("full_attention", rope)  # windows of Gemma 3 keep their frequencies
        if base := header.of("rope.freq_base"):
            rope["rope_theta"] = base
        _scale(rope, header)


def _scale(rope: dict[str, Any], header: Header) -> None:
    """Set how rotary embeddings are scaled."""
    kind, factor = header.of("rope.scaling.type"), header.of("rope.scaling.factor")
    if kind in (None, "none") or factor in (None, 0, 1):
        return
    if kind not in ("linear", "yarn"):
        what = f"model {str(header.path)!r}"
        why = f"its rotary embeddings are scaled by {kind!r}, which transformers does not read from GGUF"
        raise Refused(what, why, "load the checkpoint that the file was made from (org/name, or a folder)")
    rope.update(rope_type=kind, factor=float(factor))
    if before := header.of("rope.scaling.original_context_length"):
        rope["original_max_position_embeddings"] = int(before)
