"""Text parts of multimodal checkpoints: the configuration of the language model alone, and where its weights lie.

Only the text part is loaded, as the causal model it is. With text alone it computes what the whole model computes:
rotary embeddings over time, height and width (Qwen-VL) have the same position on all three, and so are ordinary ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cutaway.core.refuse import Refused

# text parts without a causal class of their own → the family whose modules and numbers they have
_SAME: dict[str, str] = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
_PARTS = r"(?:language_model|text_model)\."


def text_part(config: Any) -> Any:
    """Return the configuration of the text part of a multimodal one; the configuration itself if it has none."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = config.get_text_config()
    if text is config:
        return config
    if text.model_type in _SAME:
        text = _as_family(text, CONFIG_MAPPING[_SAME[text.model_type]])
    if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return config if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else text
    if getattr(config, "tie_word_embeddings", False):
        text.tie_word_embeddings = True
    return text


def key_mapping(config: Any) -> dict[str, str]:
    """Return how the names of a multimodal checkpoint become those of its text part alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return {
        rf"^(?:model\.)?{_PARTS}lm_head\.": "lm_head.",
        rf"^(?:model\.)?{_PARTS}(?:model\.)?": f"{kind.base_model_prefix}.",
    }


@contextmanager
def said_of(live: Any) -> Iterator[None]:
    """Within the block, the refusal of a live multimodal model says how its text part is read.

    Raises:
        Refused: what the block raises, for such a model with that way out.
    """
    try:
        yield
    except Refused as refusal:
        if live is None or live.config.get_text_config() is live.config:
            raise
        what, why = (
            f"a live {type(live).__name__}",
            "it reads more than text, and its blocks are not where those of a language model are",
        )
        way = "save it (save_pretrained) and load the folder: its text part is read alone"
        raise Refused(what, why, way) from refusal


def _as_family(text: Any, kind: Any) -> Any:
    """Return the same settings as a configuration of another family, with ordinary rotary embeddings."""
    held = {k: v for k, v in text.to_dict().items() if k not in ("model_type", "rope_parameters", "architectures")}
    rope = {k: v for k, v in text.rope_parameters.items() if not k.startswith("mrope")}
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    return kind(**held, rope_parameters=rope)
