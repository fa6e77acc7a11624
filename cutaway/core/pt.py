"""Tensors in PyTorch's own files: read without running any code in them, and written as plain tensors and numbers."""

from __future__ import annotations

import re
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from cutaway.core.files import write_bytes
from cutaway.core.refuse import Refused


class Opaque:
    """An object of a file whose class is not loaded: it takes whatever the file says of it, and does nothing.

    Attributes:
        args: what its class would have been called with.
        state: what it held.
    """

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kw: Any) -> Opaque:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any, **kw: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """Take an entry and forget it."""

    def extend(self, values: Any) -> None:
        """Take entries and forget them."""


def read_pt(path: str | Path, objects: bool = False) -> dict[str, Any]:
    """Read a `.pt` file that holds nothing but tensors, numbers and text by name.

    Args:
        path: the file.
        objects: take files with objects of other classes, too; each becomes an `Opaque`, and no code of it is run. Of
            one that is the whole file, what it held is returned; of a bare tensor, it under the name "".

    Raises:
        Refused: the file is missing or broken, or would run code.
    """
    if not Path(path).is_file():
        raise Refused(f"file {str(path)!r}", "there is none", "check the path")
    try:
        with warnings.catch_warnings():  # torch warns of what is refused here anyhow
            warnings.simplefilter("ignore")
            strange = get_unsafe_globals_in_checkpoint(str(path)) if objects else []
            with safe_globals([(Opaque, name) for name in strange]):
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
    found = found.state if isinstance(found, Opaque) else found
    found = {"": found} if objects and isinstance(found, torch.Tensor) else found
    if not isinstance(found, dict):
        raise Refused(f"file {str(path)!r}", f"it holds a {type(found).__name__}", "give a file of named tensors")
    return found


def write_pt(path: str | Path, content: dict[str, Any]) -> Path:
    """Write tensors, numbers and text by name, atomically."""
    buffer = BytesIO()
    torch.save(content, buffer)
    return write_bytes(path, buffer.getvalue())
