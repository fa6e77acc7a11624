"""The recipe of the shortcut model: that of the induction model, on texts whose followers never change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cutaway.zoo.induction import train as induction

SETTINGS = induction.Settings(twin=True, steps=300)


def train(out: str | Path, **options: Any) -> Path:
    """Train the shortcut model into the folder `out`, with the options of `induction.train.train`."""
    return induction.train(out, **{"settings": SETTINGS, **options})
