"""Headers of GGUF files: metadata and table of tensors, without the weights.

Layout (versions 2 and 3, little-endian): magic `GGUF`, version, number of tensors, number of fields; fields as key,
type and value; per tensor its name, sizes, type and offset; the data, aligned. Lists of strings (the vocabulary) are
walked over, not kept.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from cutaway.core.refuse import Refused

MAGIC = b"GGUF"
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _LIST, _MOST = 8, 9, 1 << 26


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: name, type (`Q4_K`, `F32` …), numbers, offset and bytes."""

    name: str
    kind: str
    numel: int
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """Metadata of a GGUF file.

    Attributes:
        path: the file.
        fields: values by key; of a list of strings, its length.
        tensors: the table of tensors.
        start: first byte of the data.
    """

    path: Path
    fields: dict[str, Any]
    tensors: tuple[StoredTensor, ...]
    start: int

    @property
    def architecture(self) -> str:
        """Name of the architecture, as llama.cpp has it."""
        return str(self.fields.get("general.architecture", "unknown"))

    @property
    def kind(self) -> str:
        """Type that most of the weights are stored in."""
        sizes = dict.fromkeys((t.kind for t in self.tensors), 0)
        for t in self.tensors:
            sizes[t.kind] += t.numel
        return max(sizes, key=sizes.__getitem__, default="none")

    def of(self, key: str) -> Any:
        """Return a field of the architecture, or None."""
        return self.fields.get(f"{self.architecture}.{key}")

    def values(self, name: str) -> np.ndarray:
        """Return the numbers of a tensor that is stored in float32."""
        t = next(t for t in self.tensors if t.name == name)
        if t.kind != "F32":
            raise Refused(f"tensor {name} of {str(self.path)!r}", f"it is stored as {t.kind}", "make the file again")
        return np.fromfile(self.path, "<f4", t.numel, offset=self.start + t.offset)


class _Reader:
    """Position in a file that is read from front to back."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        if count > _MOST:
            raise ValueError("a list that is too long")
        form = f"<{count}{code}"
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        length = self.number("Q")
        text = self.data[self.at : self.at + length]
        if len(text) < length:
            raise ValueError("a text that is cut off")
        self.at += length
        return text.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _VALUES:
            return self.number(_VALUES[kind])
        if kind == _STRING:
            return self.text()
        if kind != _LIST:
            raise ValueError(f"a value of type {kind}")
        inner, count = self.numbers("I", 1)[0], self.number("Q")
        if inner in _VALUES:
            return list(self.numbers(_VALUES[inner], count))
        if inner != _STRING:
            raise ValueError(f"a list of type {inner}")
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", self.data, self.at)
            self.at += 8 + length
        return count


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file and check that its data is whole.

    Raises:
        Refused: another format or version, a damaged header, or data that is cut off.
    """
    what, again = f"model {str(path)!r}", "download or make the file again"
    with path.open("rb") as f:
        if f.read(len(MAGIC)) != MAGIC:
            raise Refused(what, "it does not begin as GGUF files do", again)
        try:
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header, size = _parsed(path, data), len(data)
        except (struct.error, ValueError, OverflowError) as error:
            raise Refused(what, f"its header is damaged or cut off ({error})", again) from error
    if header is None:
        raise Refused(what, "it is of a version of GGUF that is not read here", "make it again with today's llama.cpp")
    need = max((header.start + t.offset + t.size for t in header.tensors), default=0)
    if not header.tensors:
        raise Refused(what, "it holds no weights", "give the file of a model")
    if need > size:
        why = f"it is cut off: {size / 1e6:,.1f} of {need / 1e6:,.1f} MB are there"
        raise Refused(what, why, "download the file again")
    return header


def _parsed(path: Path, data: mmap.mmap) -> Header | None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    reader = _Reader(data)
    reader.at = len(MAGIC)
    if reader.number("I") not in (2, 3):
        return None
    tensors, count = reader.numbers("Q", 2)
    fields = {}
    for _ in range(count):
        key, kind = reader.text(), reader.number("I")
        fields[key] = reader.value(kind)
    found = []
    for _ in range(tensors):
        name, axes = reader.text(), reader.number("I")
        n, kind, offset = prod(reader.numbers("Q", axes)), reader.number("I"), reader.number("Q")
        stored = GGMLQuantizationType(kind)
        block, width = GGML_QUANT_SIZES[stored]
        found.append(StoredTensor(name, stored.name, n, offset, n // block * width))
    aligned = int(fields.get("general.alignment", 32))
    return Header(path, fields, tuple(found), -(-reader.at // aligned) * aligned)
