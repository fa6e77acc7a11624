"""TransformerLens' names over the house: HookedTransformer, hook points, caches and helpers."""

from cutaway.compat.transformer_lens import utils
from cutaway.compat.transformer_lens.activation_cache import ActivationCache
from cutaway.compat.transformer_lens.config import HookedTransformerConfig
from cutaway.compat.transformer_lens.factored_matrix import FactoredMatrix
from cutaway.compat.transformer_lens.hook_points import HookedRootModule, HookPoint
from cutaway.compat.transformer_lens.hooked_transformer import HookedTransformer, TransformerBridge
from cutaway.compat.transformer_lens.key_value_cache import (
    HookedTransformerKeyValueCache,
    HookedTransformerKeyValueCacheEntry,
)
from cutaway.compat.transformer_lens.svd_interpreter import SVDInterpreter

EasyTransformer, EasyTransformerConfig = HookedTransformer, HookedTransformerConfig  # their first names
TransformerLensKeyValueCache = HookedTransformerKeyValueCache  # their last ones
TransformerLensKeyValueCacheEntry = HookedTransformerKeyValueCacheEntry

__all__ = [
    "ActivationCache", "EasyTransformer", "EasyTransformerConfig", "FactoredMatrix", "HookPoint", "HookedRootModule",
    "HookedTransformer", "HookedTransformerConfig", "HookedTransformerKeyValueCache",
    "HookedTransformerKeyValueCacheEntry", "SVDInterpreter", "TransformerBridge",
    "TransformerLensKeyValueCache", "TransformerLensKeyValueCacheEntry", "utils",
]  # fmt: skip
