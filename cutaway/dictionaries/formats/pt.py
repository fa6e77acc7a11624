"""Tensors in PyTorch's own files: read without running any code in them, and written as plain tensors and numbers."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from cutaway.core.files import write_bytes
from cutaway.core.refuse import Refused


def read_pt(path: str | Path) -> dict[str, Any]:
    """What a `.pt` file holds, if it holds nothing but tensors, numbers and text by name.

    Raises:
        Refused: the file is missing or broken, or would run code.
    """
    try:
        found = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile file makes of the unpickler
        why = f"it cannot be read as plain tensors: {str(error).splitlines()[0][:200]}"
        raise Refused(
            f"file {str(path)!r}", why, "ask its author for safetensors; code in files is never run"
        ) from error
    if not isinstance(found, dict):
        raise Refused(f"file {str(path)!r}", f"it holds a {type(found).__name__}", "give a file of named tensors")
    return found


def write_pt(path: str | Path, content: dict[str, Any]) -> Path:
    """Write tensors, numbers and text by name, atomically."""
    buffer = BytesIO()
    torch.save(content, buffer)
    return write_bytes(path, buffer.getvalue())
