"""The row of a latent in the table of a store; importable without torch, for the messages of the studio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LatentRow:
    """A latent in the table of a store.

    Attributes:
        latent: its number.
        density: share of the tokens on which it is active.
        interval: of the density, 95 % (Wilson).
        largest: the largest |activation|.
        mean: the mean activation where it is active; None of one that never is.
        peak: the token on which most of its largest examples stand.
        flags: flags of health.
        label: its first label, if it has one.
        source: what made the label.
        scores: scores of the label by name; a score's interval is `NAME interval`.
    """

    latent: int
    density: float
    interval: tuple[float, float]
    largest: float
    mean: float | None
    peak: str
    flags: tuple[str, ...]
    label: str | None
    source: str | None
    scores: dict[str, Any]
