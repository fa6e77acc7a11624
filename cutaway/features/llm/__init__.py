"""Descriptions of latents by a language model, and scores of them by another or the same."""
