"""The house's own format: one safetensors file with a JSON header; see `cutaway.dictionaries.store`."""

from __future__ import annotations

from pathlib import Path

from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import Files
from cutaway.dictionaries.parts import KIND
from cutaway.dictionaries.store import open_dictionary, save

NAME = "house"


def detect(files: Files) -> bool:
    """True if a file, or the only one of its kind in a folder, holds a dictionary in this format."""
    from safetensors import SafetensorError, safe_open

    file = files.only("*.safetensors")
    if file is None:
        return False
    try:
        with safe_open(str(files.root / file), "pt") as f:
            return (f.metadata() or {}).get("kind") == f'"{KIND}"'
    except (OSError, SafetensorError):
        return False


def read(files: Files) -> Dictionary:
    """Read the dictionary; nothing is left open."""
    return open_dictionary(files.root / str(files.only("*.safetensors")))


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a dictionary as one file."""
    return save(dictionary, path)
