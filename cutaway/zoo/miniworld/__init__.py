"""The miniworld: a small causal language model that ships with the toolkit, and the whole truth of its world.

`path()` is a folder that transformers loads as it is; `World.load()` is what its texts are true of;
`World.load().prompts("ioi", n=50)` are clean/corrupt prompts of a behaviour with their answers.
"""

from __future__ import annotations

from pathlib import Path

from cutaway.zoo.miniworld.world import DATA, Country, Person, World

__all__ = ["Country", "Person", "World", "path"]


def path() -> Path:
    """Return the folder of the shipped model: weights, configuration, tokenizer, world and card."""
    return DATA
