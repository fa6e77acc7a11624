"""Inspection of a folder or a file of any tool's dictionary, without reading the weights.

Formats are recognised by what files hold (keys and shapes of tensors, keys of configurations), not by their names.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cutaway.core.files import read_json, write_bytes, write_text
from cutaway.core.pt import read_pt
from cutaway.core.refuse import Keyword, Refused

T = TypeVar("T")
Shapes = dict[str, tuple[int, ...]]
PT = (".pt", ".pth", ".bin")


class Files:
    """A folder, or one file in its folder; what was looked at is remembered."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise Refused(f"path {str(path)!r}", "there is nothing", "give a folder or a file")
        self.root = self.path if self.path.is_dir() else self.path.parent
        self._shapes: dict[str, Shapes] = {}
        self._held: dict[str, dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"Files({str(self.path)!r})"

    @cached_property
    def words(self) -> str:
        """The whole path as text: some formats write layer, width and sparsity there only.

        A file keeps the name it has here: the hub's cache links it to one that says nothing.
        """
        return (self.root.resolve() / self.path.name if self.path.is_file() else self.path.resolve()).as_posix()

    def has(self, name: str) -> bool:
        """Return True if a file lies in the folder."""
        return (self.root / name).is_file()

    def matching(self, *patterns: str) -> list[str]:
        """Return the file that was named, or those of the folder, that match a pattern; in order."""
        if self.path.is_file():
            return [self.path.name] if any(self.path.match(p) for p in patterns) else []
        return sorted({p.relative_to(self.root).as_posix() for w in patterns for p in self.root.glob(w) if p.is_file()})

    def only(self, *patterns: str) -> str | None:
        """Return the one file that matches, or None if none or several do."""
        found = self.matching(*patterns)
        return found[0] if len(found) == 1 else None

    def json(self, name: str) -> dict[str, Any]:
        """Return a configuration; empty if the file is not there."""
        if not self.has(name):
            return {}
        found = read_json(self.root / name)
        return found if isinstance(found, dict) else {}

    def yaml(self, name: str) -> dict[str, Any]:
        """Return a configuration in YAML; empty if the file is not there."""
        if not self.has(name):
            return {}
        import yaml

        try:
            found = yaml.safe_load((self.root / name).read_text(encoding="utf-8"))
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise Refused(f"file {str(self.root / name)!r}", f"it is not YAML: {error}", "check the file") from error
        return found if isinstance(found, dict) else {}

    def shapes(self, name: str | None) -> Shapes:
        """Return the tensors of a file by name, with their shapes; empty if the file is missing."""
        if name is None or not self.has(name):
            return {}
        if name not in self._shapes:
            self._shapes[name] = self._looked(name)
        return self._shapes[name]

    def _looked(self, name: str) -> Shapes:
        if name.endswith(PT):
            held = self.held(name)
            return {n: tuple(t.shape) if isinstance(t, Tensor) else () for n, t in held.items()}
        if name.endswith(".npz"):
            return {n: tuple(t.shape) for n, t in self.tensors(name).items()}
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.root / name), "pt") as f:
                return {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise Refused(f"file {str(self.root / name)!r}", f"it is broken: {error}", "fetch it again") from error

    def held(self, name: str) -> dict[str, Any]:
        """Return all that a `.pt` file holds."""
        if name not in self._held:
            self._held[name] = read_pt(self.root / name)
        return self._held[name]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file."""
        if not self.has(name):
            raise Refused(f"file {str(self.root / name)!r}", "it is missing", "fetch the whole folder")
        if name.endswith(PT):
            return {n: t for n, t in self.held(name).items() if isinstance(t, Tensor)}
        if name.endswith(".npz"):
            return _npz(self.root / name)
        from safetensors.torch import load_file

        self.shapes(name)  # refuses what is broken
        return load_file(str(self.root / name))


def _npz(path: Path) -> dict[str, Tensor]:
    out = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                with archive.open(entry) as f:
                    array = np.lib.format.read_array(BytesIO(f.read()), allow_pickle=False)
                out[entry.removesuffix(".npy")] = torch.from_numpy(np.array(array))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise Refused(f"file {str(path)!r}", f"it is not a plain npz file: {error}", "fetch it again") from error
    return out


def write_npz(path: str | Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write named tensors as an npz file, atomically."""
    buffer = BytesIO()
    arrays: dict[str, Any] = {n: t.detach().cpu().numpy() for n, t in tensors.items()}
    np.savez(buffer, **arrays)
    return write_bytes(path, buffer.getvalue())


def write_plain(path: str | Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write named tensors as a safetensors file without a header, atomically."""
    from safetensors.torch import save

    return write_bytes(path, save({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}))


def write_config(path: str | Path, config: Mapping[str, Any]) -> Path:
    """Write a configuration as JSON, which is YAML as well."""
    return write_text(path, json.dumps(config, indent=1) + "\n")


def taken(files: Files, file: str, names: Iterable[str], tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the tensors of a file by name.

    Raises:
        Refused: one is missing.
    """
    return held(str(files.root / file), names, tensors)


def held(where: str, names: Iterable[str], tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the tensors of the file `where` by name.

    Raises:
        Refused: one is missing.
    """
    missing = [n for n in names if n not in tensors]
    if missing:
        raise Refused(f"file {where!r}", f"it has no {missing[0]}", f"it has {', '.join(tensors)}")
    return [tensors[n] for n in names]


def asked(given: T | None, name: str, question: str, files: Files) -> T:
    """Return a choice that the files leave open.

    Raises:
        Refused: it was not made; the refusal asks the question.
    """
    return asked_all(files, {name: (given, question)})[0]


def asked_all(files: Files, choices: Mapping[str, tuple[T | None, str]]) -> list[T]:
    """Return the choices that the files leave open, by name: what was given, and the question that it answers.

    Raises:
        Refused: some were not made; the refusal asks all their questions at once.
    """
    open_ = {name: question for name, (given, question) in choices.items() if given is None}
    if open_:
        say = (word for name in open_ for word in (" ", Keyword(name)))
        raise Refused(f"dictionary at {str(files.path)!r}", "; ".join(open_.values()), ("say it:", *say))
    return [given for given, _ in choices.values() if given is not None]


def layer_in(words: str, *patterns: str) -> int | None:
    """Return the number that the first matching pattern finds in a path; the last place counts."""
    import re

    for pattern in patterns:
        found = re.findall(pattern, words)
        if found:
            return int(found[-1])
    return None
