"""Keys and values of past columns, which a forward puts in front of its own."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class HookedTransformerKeyValueCacheEntry:
    """Keys and values of one layer, [batch, position, head, d_head]; a bridged model's keys are rotated already."""

    past_keys: Float[Tensor, "batch pos head d_head"]
    past_values: Float[Tensor, "batch pos head d_head"]
    frozen: bool = False

    @classmethod
    def init_cache_entry(cls, cfg: Any, device: Any = None, batch_size: int = 1) -> Any:
        """Make an empty entry."""
        shape = (batch_size, 0, cfg.n_key_value_heads or cfg.n_heads, cfg.d_head)
        keys, values = (torch.empty(shape, device=device, dtype=cfg.dtype) for _ in range(2))
        return cls(keys, values)

    def append(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return old and new columns together, and keep them unless frozen."""
        keys, values = torch.cat([self.past_keys, new_keys], 1), torch.cat([self.past_values, new_values], 1)
        if not self.frozen:
            self.past_keys, self.past_values = keys, values
        return keys, values


@dataclass
class HookedTransformerKeyValueCache:
    """Entries of all layers, and the attention mask of the columns so far."""

    entries: list[HookedTransformerKeyValueCacheEntry]
    previous_attention_mask: Int[Tensor, "batch pos"]
    frozen: bool = False
    _held: Any = field(default=None, repr=False)  # transformers' own cache, of a bridged model

    @classmethod
    def init_cache(cls, cfg: Any, device: Any = None, batch_size: int = 1) -> Any:
        """Make an empty cache."""
        entries = [
            HookedTransformerKeyValueCacheEntry.init_cache_entry(cfg, device, batch_size) for _ in range(cfg.n_layers)
        ]
        return cls(entries, torch.empty((batch_size, 0), device=device, dtype=torch.int))

    def freeze(self) -> None:
        """Keep the cache as it is in later forwards."""
        self._set(True)

    def unfreeze(self) -> None:
        """Let later forwards append."""
        self._set(False)

    def _set(self, frozen: bool) -> None:
        for part in (self, *self.entries):
            part.frozen = frozen

    def append_attention_mask(self, attention_mask: Int[Tensor, "batch new"]) -> Int[Tensor, "batch pos"]:
        """Return the mask of old and new columns, and keep it unless frozen."""
        mask = torch.cat([self.previous_attention_mask, attention_mask.to(self.previous_attention_mask.device)], -1)
        if not self.frozen:
            self.previous_attention_mask = mask
        return mask

    def __getitem__(self, idx: int) -> HookedTransformerKeyValueCacheEntry:
        return self.entries[idx]

    @property
    def length(self) -> int:
        """Number of columns so far."""
        return self.entries[0].past_keys.shape[1]

    def opened(self) -> Any:
        """Return transformers' cache of these columns; a copy of one that is frozen."""
        from transformers import DynamicCache

        held = self._held if self._held is not None else DynamicCache()
        if self.frozen:
            held = copy(held)
            held.layers = [copy(layer) for layer in held.layers]
        return held

    def close(self, held: Any) -> None:
        """Take over what a forward has appended, unless frozen."""
        if self.frozen:
            return
        self._held = held
        for entry, layer in zip(self.entries, held.layers, strict=False):
            entry.past_keys, entry.past_values = layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
