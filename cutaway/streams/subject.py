"""The subject `stream`: activations on disk, which methods read from the beginning as often as they need."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.streams.harvest import harvest
from cutaway.streams.packing import Packing
from cutaway.streams.shards import Shards
from cutaway.streams.sources import from_texts


def _open(flags: Mapping[str, Any], opened: Mapping[str, Any]) -> Shards:
    """Open a folder; a method that takes a model, too, gets no activations of another."""
    return Shards(flags["stream"], opened.get("model"))


def _example(opened: Mapping[str, Any]) -> Shards:
    """Harvest a few words into a folder that goes with them."""
    names = ("Mary", "John", "Anna", "Peter")
    texts = [f"{a} gave a book to {b}." for a in names for b in names if a != b]
    folder = tempfile.TemporaryDirectory()
    shards = harvest(opened["model"], from_texts(texts), "resid_post.1", folder.name, packing=Packing(16))
    weakref.finalize(shards, folder.cleanup)
    return shards


register(
    Subject(
        "stream",
        Shards,
        (Flag("stream", str, REQUIRED, "activations on disk: a folder of `cutaway harvest`"),),
        _open,
        _example,
        advice="ca.streams.Shards(folder)",
    )
)
