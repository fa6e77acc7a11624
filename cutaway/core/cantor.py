"""Cantor's pairing: one number for a layer and a feature, as files of graphs and of feature pages have them."""

from __future__ import annotations

from math import isqrt


def cantor(layer: int, number: int) -> int:
    """Return the number that stands for a layer and a feature (Cantor's pairing)."""
    return (layer + number) * (layer + number + 1) // 2 + number


def from_cantor(paired: int) -> tuple[int, int]:
    """Return the layer and the feature of a paired number."""
    whole = (isqrt(8 * paired + 1) - 1) // 2
    number = paired - whole * (whole + 1) // 2
    return whole - number, number
