"""Files: safetensors with a JSON header, and JSON. Written whole or not at all; never pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.core.refuse import Refused


def write_json(path: str | Path, data: Any) -> Path:
    """Write `data` as indented JSON, atomically."""
    return _replace(Path(path), (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        Refused: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"file {str(path)!r}", f"it cannot be read as JSON: {error}", "give a JSON file") from error


def write_text(path: str | Path, text: str) -> Path:
    """Write text as UTF-8, atomically."""
    return _replace(Path(path), text.encode())


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write bytes, atomically."""
    return _replace(Path(path), content)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write named tensors with a JSON-ready header as one safetensors file, atomically."""
    from safetensors.torch import save

    ready: dict[str, Tensor] = {}
    held: set[int] = set()  # safetensors refuses tensors that share memory
    for n, t in tensors.items():
        t = t.detach().cpu().contiguous()
        ready[n] = t.clone() if t.untyped_storage().data_ptr() in held else t
        held.add(t.untyped_storage().data_ptr())
    return _replace(Path(path), save(ready, {n: json.dumps(v) for n, v in header.items()}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Named tensors and header of a file written by `write_tensors`.

    Raises:
        Refused: the file is missing, broken, or a pickle.
    """
    from safetensors import SafetensorError, safe_open

    if str(path).endswith((".pt", ".pth", ".pkl", ".bin", ".ckpt")):
        raise Refused(
            f"file {str(path)!r}", "it may be a pickle, which can run code when read", "convert it to safetensors"
        )
    try:
        with safe_open(str(path), "pt") as f:
            header = {n: json.loads(v) for n, v in (f.metadata() or {}).items()}
            return {n: f.get_tensor(n) for n in f.keys()}, header  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise Refused(
            f"file {str(path)!r}", f"it is not a readable safetensors file: {error}", "check the path"
        ) from error


def tensor_bytes(t: Tensor) -> memoryview:
    """The raw bytes of a tensor on the CPU, for hashing."""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _replace(path: Path, content: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(content)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise Refused(
            f"file {str(path)!r}", f"it cannot be written: {error.strerror or error}", "choose another place"
        ) from error
    return path
