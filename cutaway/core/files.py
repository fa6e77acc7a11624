"""Files: safetensors with a JSON header, and JSON. Written whole or not at all; never pickle."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.core.json_lines import written
from cutaway.core.refuse import Refused

LARGE = 1 << 63  # what no number of ours reaches
#: what code meets where a header holds something else than what was written
_DAMAGES = (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, RuntimeError,
            ZeroDivisionError)  # fmt: skip
_SPOKEN = {dict: "object", list: "list", str: "text", bool: "true or false", int: "whole number"}


def write_json(path: str | Path, data: Any) -> Path:
    """Write `data` as indented JSON, atomically."""
    return write_bytes(path, (written(data, indent=1) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        Refused: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"file {str(path)!r}", f"it cannot be read as JSON: {error}", "give a JSON file") from error


def write_text(path: str | Path, text: str) -> Path:
    """Write text as UTF-8, atomically; half a surrogate pair, which UTF-8 does not have, becomes a question mark."""
    return write_bytes(path, text.encode(errors="replace"))


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write bytes, atomically."""
    return _replace(Path(path), lambda file: Path(file).write_bytes(content))


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write named tensors with a JSON-ready header as one safetensors file, atomically, without a copy in memory."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready: dict[str, Tensor] = {}
    held: set[int] = set()  # safetensors refuses tensors that share memory
    for n, t in tensors.items():
        t = _plain(t)
        ready[n] = t.clone() if t.untyped_storage().data_ptr() in held else t
        held.add(t.untyped_storage().data_ptr())

    def fill(file: str) -> None:
        try:
            save_file(ready, file, {n: json.dumps(v) for n, v in header.items()})
        except KeyError as error:  # how safetensors says that it has no name for a dtype
            why = f"safetensors files do not hold {error.args[0]}"
            raise Refused(f"file {str(path)!r}", why, "convert the tensor to another dtype") from error
        except SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error

    return _replace(Path(path), fill)


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
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise Refused(
            f"file {str(path)!r}", f"it is not a readable safetensors file: {error}", "check the path"
        ) from error


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the header of a file written by `write_tensors`, without its tensors; nothing if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as f:
            return {n: json.loads(v) for n, v in (f.metadata() or {}).items()}
    except (OSError, SafetensorError, ValueError, RecursionError):
        return {}


def make_folder(path: str | Path) -> Path:
    """Make a folder if it is not there, and return its path.

    Raises:
        Refused: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"it cannot be made: {error.strerror}"
        raise Refused(f"folder {str(path)!r}", why, "choose another place") from error
    return Path(path)


def new_folder(path: str | Path) -> Path:
    """Return the path of a folder that is empty or not there yet.

    Raises:
        Refused: there is something.
    """
    found = Path(path)
    if found.exists() and (not found.is_dir() or any(found.iterdir())):
        raise Refused(f"folder {str(path)!r}", "it is not empty", "give a new folder")
    return found


@contextmanager
def reading(path: str | Path, fault: str = "its header is damaged") -> Iterator[None]:
    """Within the block, errors are blamed on the file: by default, its header holds something impossible.

    Raises:
        Refused: in place of any error that a value of another type or size leads to.
    """
    try:
        yield
    except _DAMAGES as error:
        why = f"{fault}: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
        raise Refused(f"file {str(path)!r}", why, "copy it again, or write it again") from error


def held(header: Any, name: str, kind: type, default: Any = None) -> Any:
    """Return an entry of a header, which must be of its kind; without it the default, if there is one.

    Raises:
        ValueError: it is missing, or of another kind.
    """
    if not isinstance(header, Mapping):
        raise ValueError(f"what should hold {name!r} is {header!r:.60}, which is no object")
    value = header.get(name, default)
    if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or not -LARGE < value < LARGE)):
        raise ValueError(f"{name!r} is {value!r:.60}, which is no {_SPOKEN.get(kind, kind.__name__)}")
    return value


def tensor_bytes(t: Tensor) -> memoryview:
    """Return the raw bytes of a tensor's values in their order, whatever its strides, for hashing."""
    t = t.dequantize() if t.is_quantized else t  # else values of another scale would have the same bytes
    return _plain(t).reshape(-1).view(torch.uint8).numpy().data


def _plain(t: Tensor) -> Tensor:
    """Return the values on the CPU, one behind the other as the shape says, and none of them a conjugate or negative
    view.

    A tensor of one element is `contiguous` with any strides, which neither a view as bytes nor a file can have.
    """
    if t.is_meta:
        raise Refused("the values of a tensor", "it is on the meta device and has none", "load the weights first")
    t = t.detach().to_dense() if t.layout is not torch.strided else t.detach()
    t = t.cpu().resolve_conj().resolve_neg().contiguous()
    wanted = [math.prod(t.shape[d + 1 :]) for d in range(t.ndim)]
    return t if not t.numel() or list(t.stride()) == wanted else t.clone(memory_format=torch.contiguous_format)


def _replace(path: Path, fill: Callable[[str], object]) -> Path:
    """Let `fill` write a file of another name beside a path, and move it there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            os.close(handle)
            fill(temporary)
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
