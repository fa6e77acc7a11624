"""Sources of documents, in a fixed order, that can be read again from any document on.

A document is a text, or a row of token ids (a list or a tensor). Every source says what it is (`identity`), so that
activations can name the data that they came from, and yields the same documents in the same order each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cutaway.core.files import read_tensors
from cutaway.core.json_lines import numbered, parsed
from cutaway.core.record import hash_tensors, hash_text
from cutaway.core.refuse import Refused, nearest

Document = str | Sequence[int] | Tensor


@runtime_checkable
class Documents(Protocol):
    """Protocol of a source that a stream reads: documents by number, and their identity."""

    def read(self, first: int) -> Iterator[Document]:
        """Return the documents from number `first` on, in their fixed order."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return the identity of the documents, JSON-ready, for manifests and records."""
        ...


@dataclass(frozen=True)
class TextFiles:
    """Text files, one after the other. A document is a file, a paragraph (cut at empty lines) or a line.

    Pieces that hold only white space are no documents.
    """

    paths: tuple[Path, ...]
    unit: str = "file"

    def read(self, first: int) -> Iterator[Document]:
        """Return the documents from number `first` on."""
        return islice(self._all(), first, None)

    def identity(self) -> dict[str, Any]:
        """Return the names and hashes of the files."""
        return {"kind": "text files", "unit": self.unit, "files": [_file(p) for p in self.paths]}

    def _all(self) -> Iterator[str]:
        for path in self.paths:
            with _opened(path) as lines:
                yield from filter(str.strip, self._pieces(path, lines))

    def _pieces(self, path: Path, lines: Iterable[str]) -> Iterator[str]:
        try:
            if self.unit == "line":
                yield from (line.rstrip("\n") for line in lines)
                return
            held: list[str] = []
            for line in lines:
                if self.unit == "paragraph" and not line.strip():
                    yield "".join(held).rstrip("\n")
                    held = []
                else:
                    held.append(line)
            yield "".join(held).rstrip("\n") if self.unit == "paragraph" else "".join(held)
        except UnicodeDecodeError as error:
            raise Refused(f"text file {str(path)!r}", f"it is not UTF-8: {error}", "convert it to UTF-8") from error


@dataclass(frozen=True)
class JsonLines:
    """Files with one JSON object a line; a document is the text, or the list of token ids, in one field of it."""

    paths: tuple[Path, ...]
    field: str = "text"

    def read(self, first: int) -> Iterator[Document]:
        """Yield the documents from number `first` on; earlier lines are not parsed."""
        left = first
        for path in self.paths:
            try:
                for number, line in numbered(path):
                    if left:
                        left -= 1
                    else:
                        yield self._document(path, number, line)
            except (OSError, UnicodeDecodeError) as error:
                why = f"it cannot be read as UTF-8: {error}"
                raise Refused(f"tokens from {str(path)!r}", why, "check it, or convert it to UTF-8") from error

    def identity(self) -> dict[str, Any]:
        """Return the names and hashes of the files, and the field."""
        return {"kind": "JSON lines", "field": self.field, "files": [_file(p) for p in self.paths]}

    def _document(self, path: Path, number: int, line: str) -> Document:
        where = f"line {number} of {str(path)!r}"
        row = parsed(line, where, "give one JSON object a line")
        if not isinstance(row, dict) or self.field not in row:
            has = f"it has {', '.join(map(repr, row))}" if isinstance(row, dict) else "it is no object"
            raise Refused(where, f"it has no field {self.field!r}: {has}", "name the field with the text")
        return _checked(row[self.field], f"field {self.field!r} of {where}")


@dataclass(frozen=True)
class HubTexts:
    """A data set of the Hugging Face hub, or one on disk that `datasets` can read, streamed."""

    name: str
    field: str = "text"
    split: str = "train"
    config: str | None = None
    revision: str | None = None

    def rows(self, first: int = 0) -> Any:
        """Return the rows of the data set from number `first` on.

        Raises:
            Refused: it cannot be opened, or the package `datasets` is not installed.
        """
        try:
            from datasets import load_dataset  # type: ignore[import-not-found]
        except ImportError as error:
            why = "the package datasets is not installed"
            raise Refused(f"data set {self.name!r}", why, "pip install 'cutaway[datasets]', or give files") from error
        try:
            rows = load_dataset(self.name, self.config, split=self.split, revision=self.revision, streaming=True)
        except Exception as error:
            why = f"it cannot be opened: {' '.join(str(error).split())[:200]}"
            raise Refused(f"data set {self.name!r}", why, "check its name, config, split and the network") from error
        return rows.skip(first)

    def read(self, first: int) -> Iterator[Document]:
        """Yield the documents from number `first` on."""
        for number, row in enumerate(self.rows(first), first):
            if self.field not in row:
                why = f"it has no field {self.field!r}: it has {', '.join(map(repr, row))}"
                raise Refused(f"row {number} of {self.name!r}", why, "name the field with the text")
            yield _checked(row[self.field], f"field {self.field!r} of row {number} of {self.name!r}")

    def identity(self) -> dict[str, Any]:
        """Return the name, config, split and revision."""
        return {
            "kind": "hub",
            "name": self.name,
            "config": self.config,
            "split": self.split,
            "field": self.field,
            "revision": self.revision,
        }


@dataclass(frozen=True)
class TokenRows:
    """Token ids that are there already: the rows of a matrix, or one long row."""

    ids: Tensor
    name: str = "ids"

    def read(self, first: int) -> Iterator[Document]:
        """Yield the rows from number `first` on."""
        yield from self.ids[first:]

    def identity(self) -> dict[str, Any]:
        """Shape and hash."""
        return {
            "kind": "token ids",
            "name": self.name,
            "shape": list(self.ids.shape),
            "hash": hash_tensors({"ids": self.ids}),
        }


@dataclass(frozen=True)
class Generated:
    """Documents from Python: a collection, or a function that starts them again at each call."""

    begin: Callable[[], Iterable[Document]]
    name: str
    hash: str | None = None

    def read(self, first: int) -> Iterator[Document]:
        """Yield the documents from number `first` on; earlier ones are made and thrown away."""
        for number, document in enumerate(islice(self.begin(), first, None), first):
            yield _checked(document, f"document {number} of {self.name}")

    def identity(self) -> dict[str, Any]:
        """Return the name, and the hash of a collection (None of a function: its documents are not known before)."""
        return {"kind": "made", "name": self.name, "hash": self.hash}


def from_text_files(paths: str | Path | Sequence[str | Path], unit: str = "file") -> TextFiles:
    """Read text files as documents, one per `unit` (file, paragraph or line); a folder means the .txt files in it,
    by name.

    Raises:
        Refused: a file is not there, or a folder holds none.
    """
    if unit not in ("file", "paragraph", "line"):
        raise Refused(f"unit {unit!r}", "it is no way of cutting files", "use file, paragraph or line")
    return TextFiles(_found(paths, ".txt"), unit)


def from_json_lines(paths: str | Path | Sequence[str | Path], field: str = "text") -> JsonLines:
    """Read files of JSON lines as documents; a folder means the .jsonl files in it, in the order of their names.

    Raises:
        Refused: a file is not there, or a folder holds none.
    """
    return JsonLines(_found(paths, ".jsonl"), field)


def from_ids(ids: Tensor | str | Path, name: str = "") -> TokenRows:
    """Read token ids as documents, one per row: a tensor, a .safetensors file with the tensor `ids`, or a .npy file.

    Raises:
        Refused: no such file, a pickle, or other than whole numbers of one or two axes.
    """
    if isinstance(ids, Tensor):
        found, name = ids, name or "ids"
    else:
        path = Path(ids)
        found, name = _ids_file(path), name or path.name
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.ndim not in (1, 2):
        why = f"they are {str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}"
        raise Refused(f"token ids {name!r}", why, "give whole numbers of shape [tokens] or [rows, tokens]")
    return TokenRows(torch.atleast_2d(found), name)


def from_texts(texts: Iterable[Document] | Callable[[], Iterable[Document]], name: str = "texts") -> Generated:
    """Make documents from Python: a collection, or a function that returns a fresh iterator.

    Raises:
        Refused: an iterator, which can be read only once.
    """
    if callable(texts):
        return Generated(texts, name)
    if isinstance(texts, str):
        raise Refused("one text", "its characters would be the documents", "give a list of texts")
    if iter(texts) is texts:
        why = "an iterator can be read only once, and a stream must be able to go back"
        raise Refused(f"{name}: {type(texts).__name__}", why, "give a list, or a function that returns an iterator")
    if not isinstance(texts, Sequence):
        return Generated(lambda: texts, name)
    known = [_checked(t, f"document {n} of {name}") for n, t in enumerate(texts)]
    parts = (t if isinstance(t, str) else ",".join(str(int(i)) for i in t) for t in known)
    return Generated(lambda: known, name, hash_text(*parts))


def documents(spec: str, field: str = "text") -> Documents:
    """Open the documents that a short text names, as on a command line.

    `hub:org/name`, `hub:org/name:split` or `hub:org/name:config:split`; a .jsonl, .safetensors or .npy file; or text
    files and folders of them.

    Raises:
        Refused: nothing of that kind.
    """
    if spec.startswith("hub:"):
        name, *rest = spec.removeprefix("hub:").split(":")
        config, split = (None, *rest)[-2:] if rest else (None, "train")
        return HubTexts(name, field, str(split), config)
    path = Path(spec)
    inside = {p.suffix for p in path.iterdir()} if path.is_dir() else set[str]()
    if path.suffix in (".jsonl", ".ndjson") or (".jsonl" in inside and ".txt" not in inside):
        return from_json_lines(path, field)
    if path.suffix in (".safetensors", ".npy", ".pt", ".pth", ".npz", ".bin"):
        return from_ids(path)
    return from_text_files(path)


def _found(paths: str | Path | Sequence[str | Path], suffix: str) -> tuple[Path, ...]:
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]
    files: list[Path] = []
    for path in given:
        inside = sorted(path.glob(f"*{suffix}")) if path.is_dir() else [path]
        missing = [p for p in inside if not p.is_file()]
        if missing or not inside:
            there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            near = nearest(path.name, there) if missing else ""
            why = f"it holds no {suffix} file" if not inside else "there is no such file"
            raise Refused(f"tokens from {str(path)!r}", why + (f"; near: {near}" if near else ""), "check the path")
        files += inside
    if not files:
        raise Refused("an empty list of files", "there is nothing to read", "give at least one file")
    return tuple(files)


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8")
    except OSError as error:
        raise Refused(f"tokens from {str(path)!r}", f"it cannot be read: {error.strerror}", "check it") from error


def _ids_file(path: Path) -> Tensor:
    if path.suffix != ".npy":
        tensors, _ = read_tensors(path)
        if "ids" not in tensors:
            has = f"it holds {', '.join(tensors)}"
            raise Refused(f"file {str(path)!r}", f"it has no tensor `ids`: {has}", "call the tensor `ids`")
        return tensors["ids"]
    import numpy as np

    try:
        array = np.lib.format.open_memmap(path, mode="r")  # of Python objects it refuses to make one
        return torch.from_numpy(np.array(array, dtype=np.int64 if array.dtype.kind in "iu" else array.dtype))
    except (OSError, ValueError, TypeError) as error:
        raise Refused(
            f"file {str(path)!r}", f"it is not an array of numbers: {error}", "save it with np.save"
        ) from error


def _checked(found: Any, where: str) -> Document:
    if isinstance(found, str):
        try:
            found.encode()
        except UnicodeEncodeError as error:
            why = f"character {error.start} is half of one (a lone surrogate, as in a text cut within an emoji)"
            raise Refused(where, why, "mend that text, or leave it out") from error
        return found
    if isinstance(found, Tensor) and found.ndim == 1 and found.dtype in (torch.int64, torch.int32):
        return found
    if isinstance(found, list | tuple) and all(type(i) is int for i in found):
        return found
    raise Refused(where, f"it is {type(found).__name__}", "give a text, or a list of token ids")


def _file(path: Path) -> dict[str, Any]:
    """Return the name, size and hash of a file. A file that does not change is hashed once per process."""
    s = path.stat()
    return {"name": path.name, "bytes": s.st_size, "hash": _hash(path.resolve(), s.st_size, s.st_mtime_ns, s.st_ino)}


@lru_cache(1024)
def _hash(path: Path, size: int, changed: int, node: int) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]
