"""Features: what single latents of a dictionary do in a model."""

from cutaway.features.latents import latents

__all__ = ["latents"]
