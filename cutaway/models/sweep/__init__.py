"""Sweeps: many edited variants of the same prompts as one plan."""
