"""SAELens' names over the house's dictionaries, in the words of its versions 0 to 6."""

from cutaway.compat.sae_lens.configs import (
    FROZEN,
    TRAINING,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    SAEConfig,
    SAEMetadata,
    TrainingSAEConfig,
    extract_layer_from_tlens_hook_name,
)
from cutaway.compat.sae_lens.directory import get_neuronpedia_quick_list, get_pretrained_saes_directory
from cutaway.compat.sae_lens.hooked_sae_transformer import HookedSAETransformer, SAETransformerBridge
from cutaway.compat.sae_lens.sae import CLASSES, SAE
from cutaway.compat.sae_lens.training import (
    ActivationsStore,
    LanguageModelSAETrainingRunner,
    SAETrainingRunner,
    language_model_sae_runner,
)

SparseAutoencoder = SAE
globals().update({c.__name__: c for c in (*CLASSES.values(), *FROZEN.values(), *TRAINING.values())})
__all__ = [
    "SAE", "ActivationsStore", "HookedSAETransformer", "LanguageModelSAERunnerConfig", "LanguageModelSAETrainingRunner",
    "LoggingConfig", "SAEConfig", "SAEMetadata", "SAETrainingRunner", "SAETransformerBridge", "SparseAutoencoder",
    "TrainingSAEConfig", "extract_layer_from_tlens_hook_name", "get_neuronpedia_quick_list",
    "get_pretrained_saes_directory", "language_model_sae_runner",
]  # fmt: skip
