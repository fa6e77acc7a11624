"""A small attention-only model that learned induction, and what its texts are.

Two layers of four heads, no MLPs (of width 1, held at zero), 64 words. A text is a block of 12 to 24 different words in
random order, said again and again: only what followed a word earlier tells what follows now. Its twin, `shortcut`, has
texts of the same form whose blocks are the same everywhere, so that a table of followers suffices.
"""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"


def path() -> Path:
    """Return the folder of the shipped model: weights, configuration and tokenizer."""
    return DATA
