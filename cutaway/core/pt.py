"""Tensors in PyTorch's own files: read without running any code in them, and written as plain tensors and numbers."""

from __future__ import annotations

import re
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from cutaway.core.files import write_bytes
from cutaway.core.refuse import Refused


def read_pt(path: str | Path) -> dict[str, Any]:
    """Read a `.pt` file that holds nothing but tensors, numbers and text by name.

    Raises:
        Refused: the file is missing or broken, or would run code.
    """
    if not Path(path).is_file():
        raise Refused(f"file {str(path)!r}", "there is none", "check the path")
    try:
        with warnings.catch_warnings():  # torch warns of what is refused here anyhow
            warnings.simplefilter("ignore")
            found = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile file makes of the unpickler
        # torch's own words advise to run the file's code; only the name of what it would have run is taken from them
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{named[1]}, which is code" if named else "something else, or is broken"
        raise Refused(
            f"file {str(path)!r}",
            f"it should hold tensors, numbers and text, and holds {what}",
            "ask its author for safetensors; code in files is never run",
        ) from None
    if not isinstance(found, dict):
        raise Refused(f"file {str(path)!r}", f"it holds a {type(found).__name__}", "give a file of named tensors")
    return found


def write_pt(path: str | Path, content: dict[str, Any]) -> Path:
    """Write tensors, numbers and text by name, atomically."""
    buffer = BytesIO()
    torch.save(content, buffer)
    return write_bytes(path, buffer.getvalue())
