"""Features: what single latents of a dictionary do in a model."""

from cutaway.features.latents import LatentEffects, LatentPositionEffects, latents

__all__ = ["LatentEffects", "LatentPositionEffects", "latents"]
