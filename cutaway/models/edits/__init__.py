"""Edits: changes of activations and of weights, as data."""
