"""The twin of the induction model that needs no induction: texts of the same form, whose followers never change.

Every text goes round one of three fixed cycles of 20, 21 and 23 words, so blocks are repeated as often as in those of
`induction`, and a table of followers predicts them all. A method that finds induction heads here is wrong.
"""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"


def path() -> Path:
    """Return the folder of the shipped model: weights, configuration and tokenizer."""
    return DATA
