"""The configuration of a HookedTransformer, under TransformerLens' names."""

from __future__ import annotations

import pprint
import random
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from cutaway.core.refuse import Refused, nearest


@dataclass
class HookedTransformerConfig:
    """Sizes and choices of a HookedTransformer; −1 stands for "derived from the others"."""

    n_layers: int
    d_model: int
    n_ctx: int
    d_head: int
    model_name: str = "custom"
    n_heads: int = -1
    d_mlp: int | None = None
    act_fn: str | None = None
    d_vocab: int = -1
    eps: float = 1e-5
    use_attn_result: bool = False
    use_attn_scale: bool = True
    attn_scale: float = -1.0
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False
    use_attn_in: bool = False
    use_local_attn: bool = False
    ungroup_grouped_query_attention: bool = False
    original_architecture: str | None = None
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    tokenizer_name: str | None = None
    window_size: int | None = None
    attn_types: list[str] | None = None
    init_mode: str = "gpt2"
    normalization_type: str | None = "LN"
    device: Any = None
    n_devices: int = 1
    attention_dir: str = "causal"
    attn_only: bool = False
    seed: int | None = None
    initializer_range: float = -1.0
    init_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    positional_embedding_type: str = "standard"
    final_rms: bool = False
    d_vocab_out: int = -1
    parallel_attn_mlp: bool = False
    rotary_dim: int | None = None
    n_params: int | None = None
    use_hook_tokens: bool = False
    gated_mlp: bool = False
    default_prepend_bos: bool = True
    dtype: torch.dtype = torch.float32
    tokenizer_prepends_bos: bool | None = None
    n_key_value_heads: int | None = None
    post_embedding_ln: bool = False
    rotary_base: float = 10000
    rotary_adjacent_pairs: bool = False
    trust_remote_code: bool = False
    use_qk_norm: bool = False
    use_normalization_before_and_after: bool = False
    attn_scores_soft_cap: float = -1.0
    output_logits_soft_cap: float = -1.0
    tie_word_embeddings: bool = False
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        if self.load_in_4bit:
            raise Refused("load_in_4bit=True", "weights here are as torch has them", "leave it out")
        if self.n_heads == -1:
            self.n_heads = self.d_model // self.d_head
        if self.seed is not None:
            self.set_seed_everywhere(self.seed)
        if not self.attn_only:
            if self.act_fn is None:
                raise ValueError("act_fn must be specified for non-attn-only models")
            self.d_mlp = self.d_model * 4 if self.d_mlp is None else self.d_mlp
        if self.initializer_range < 0:
            scaled = "_" in self.init_mode or self.init_mode == "muP"  # then it is a gain
            self.initializer_range = 1.0 if scaled else 0.8 / np.sqrt(self.d_model)
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        if self.positional_embedding_type == "rotary" and self.rotary_dim is None:
            self.rotary_dim = self.d_head
        if self.use_attn_scale and self.attn_scale == -1.0:
            self.attn_scale = float(np.sqrt(self.d_head))
        self.n_params = self.n_layers * self.d_model * self.d_head * self.n_heads * 4
        if not self.attn_only:
            self.n_params += self.n_layers * self.d_model * int(self.d_mlp or 0) * (2 + self.gated_mlp)
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @classmethod
    def unwrap(cls, config: Any) -> HookedTransformerConfig:
        """Return the configuration itself, or that of a dictionary."""
        return cls.from_dict(config) if isinstance(config, dict) else config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> HookedTransformerConfig:
        """Make a configuration of a dictionary.

        Raises:
            Refused: a word that no version knows, or that this façade does not build.
        """
        known = [f.name for f in fields(cls)]
        if unknown := [n for n in config_dict if n not in known]:
            near = nearest(unknown[0], known)
            raise Refused(
                f"HookedTransformerConfig({unknown[0]}=…)",
                "a native model here has no such setting" + (f"; near: {near}" if near else ""),
                "leave it out, or load a Hugging Face model, which keeps its own architecture",
            )
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return self.__dict__

    def __repr__(self) -> str:
        return "HookedTransformerConfig:\n" + pprint.pformat(self.to_dict())

    def set_seed_everywhere(self, seed: int) -> None:
        """Seed torch, Python and numpy."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def is_layer_norm_activation(self) -> bool:
        """Return True if the activation is followed by a norm (SoLU)."""
        return self.act_fn is not None and self.act_fn.endswith("_ln")
