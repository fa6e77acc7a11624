"""Patching: what changes when an activation is exchanged for its value in another run."""

from cutaway.patching.activation import HeadEffects, PositionEffects, activation

__all__ = ["HeadEffects", "PositionEffects", "activation"]
