"""The house's own format: one safetensors file with a JSON header; see `cutaway.dictionaries.store`."""

from __future__ import annotations

from pathlib import Path

from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.source import Source
from cutaway.dictionaries.parts import KIND
from cutaway.dictionaries.store import open_dictionary, save

NAME = "house"


def detect(source: Source) -> bool:
    """True if a file, or the only one of its kind in a folder, holds a dictionary in this format."""
    from safetensors import SafetensorError, safe_open

    file = source.only("*.safetensors")
    if file is None:
        return False
    try:
        with safe_open(str(source.root / file), "pt") as f:
            return (f.metadata() or {}).get("kind") == f'"{KIND}"'
    except (OSError, SafetensorError):
        return False


def read(source: Source) -> Dictionary:
    """Read the dictionary; nothing is left open."""
    return open_dictionary(source.root / str(source.only("*.safetensors")))


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a dictionary as one file."""
    return save(dictionary, path)
