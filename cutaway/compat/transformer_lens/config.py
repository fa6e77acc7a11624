"""The configuration of a HookedTransformer, under TransformerLens' names."""

from __future__ import annotations

import pprint
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cutaway.compat.words import Words
from cutaway.core.files import read_json
from cutaway.core.refuse import Refused


class HookedTransformerConfig(Words):
    """Sizes and choices of a HookedTransformer, by the words of `words.json`; −1 stands for "derived from the others".

    Raises:
        Refused: a word that no version knows, or that this façade does not build.
    """

    words = read_json(Path(__file__).with_name("words.json")) | {"dtype": torch.float32}

    def __init__(self, **given: Any):
        super().__init__(**given)
        if missing := [word for word in ("n_layers", "d_model", "n_ctx", "d_head") if getattr(self, word) is None]:
            raise TypeError(f"HookedTransformerConfig() missing required argument: {missing[0]!r}")
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
        """Make a configuration of a dictionary."""
        return cls(**config_dict)

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
