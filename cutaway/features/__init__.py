"""Features: what single latents of a dictionary do in a model, and stores of what a harvest found about them."""

from cutaway.features import search
from cutaway.features.card import FeatureCard, card
from cutaway.features.compare import MatchedLatents, compare
from cutaway.features.contrast import LatentContrast, contrast
from cutaway.features.corpora import CorpusDifference, corpora
from cutaway.features.explain import Explanations, explain
from cutaway.features.harvest import Keep, harvest
from cutaway.features.latent_direction import LatentDirection
from cutaway.features.latents import latents
from cutaway.features.llm.client import Client
from cutaway.features.llm.describe import Descriptions, describe
from cutaway.features.store.assemble import merge
from cutaway.features.store.feature_store import FeatureStore

__all__ = [
    "Client",
    "CorpusDifference",
    "Descriptions",
    "Explanations",
    "FeatureCard",
    "FeatureStore",
    "Keep",
    "LatentContrast",
    "LatentDirection",
    "MatchedLatents",
    "card",
    "compare",
    "contrast",
    "corpora",
    "describe",
    "explain",
    "harvest",
    "latents",
    "merge",
    "search",
]
