"""Circuits: which edges between heads and MLPs make an answer, and what holds of them when the others are cut."""

__all__: list[str] = []
