"""Folders that a harvest fills: notes of what is done while it runs, and at its end a signed manifest of all files.

A manifest names its kind and version, the `harvest` (a hash of everything that was asked for), the model, the sum of
every file, and in `key` the hash of all that it says. Before there is a manifest, the notes say how far the harvest has
come; the same call goes on from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from cutaway.core.files import held, make_folder, read_json, read_tensors, reading
from cutaway.core.record import hash_text
from cutaway.core.refuse import Refused
from cutaway.models.model import Model

MANIFEST, NOTES = "manifest.json", "harvest.part.safetensors"
_AGAIN = "harvest again, or copy the folder anew"
File = Mapping[str, Any]  # name, bytes and SHA-256 of a file
_FILE = (("file", str), ("bytes", int), ("sha256", str))


def read_manifest(
    folder: Path, kind: str, version: int, files: Callable[[dict[str, Any]], Iterable[File]]
) -> dict[str, Any]:
    """Return the manifest of a finished harvest, after looking whether its files are there.

    Args:
        folder: where it lies.
        kind: the kind that it must be of.
        version: the version that is read.
        files: returns the files that a manifest names, and meets an error if the manifest cannot be used.

    Raises:
        Refused: no manifest, one of something else or that was changed, or files that are missing or of other sizes.
    """
    path, whole = folder / MANIFEST, f"{kind} in {str(folder)!r}"
    if not path.is_file():
        why = f"there is no {MANIFEST}: no harvest has finished there"
        raise Refused(whole, why, "give the folder of a harvest")
    m = read_json(path)
    if not isinstance(m, dict) or m.get("kind") != kind:
        raise Refused(whole, f"{path.name} is not of {kind}", "give the folder of a harvest")
    if m.get("version") != version:
        why = f"they are of version {m.get('version')}, and {version} is read here"
        raise Refused(whole, why, "harvest them again, or use another release")
    if m.get("key") != manifest_key(m):
        raise Refused(whole, f"{path.name} was changed", "harvest them again")
    with reading(path):
        rows = list(files(m))
        for row, (name, form) in product(rows, _FILE):
            held(row, name, form)
        outside = [row["file"] for row in rows if Path(row["file"]).name != row["file"]]
        if outside:
            raise ValueError(f"{outside[0]!r} is no name of a file beside it")
    for row in rows:
        file = folder / row["file"]
        found = file.stat().st_size if file.is_file() else None
        if found != row["bytes"]:
            why = "it is missing" if found is None else f"it has {found} bytes instead of {row['bytes']}"
            raise Refused(f"file {str(file)!r}", why, _AGAIN)
    return m


def check_sum(path: Path, wanted: str) -> None:
    """Check a file against its sum.

    Raises:
        Refused: it is missing, or was changed.
    """
    if not path.is_file() or file_hash(path) != wanted:
        why = "its content is not what was written (its SHA-256 is another)" if path.is_file() else "it is missing"
        raise Refused(f"file {str(path)!r}", why, _AGAIN)


def check_model(folder: Path, manifest: Mapping[str, Any], model: Model) -> None:
    """Refuse another model than the one of a harvest.

    Raises:
        Refused: another configuration, or other weights.
    """
    theirs, own = manifest["model"], model.identity()
    for what in ("config", "weights"):
        if theirs.get(what) != own[what]:
            why = f"they are of {theirs.get('name')} ({theirs.get('dtype')}) with other {what} than {own['name']}"
            raise Refused(f"{manifest['kind']} in {str(folder)!r}", why, "harvest from this model")


def finished(out: Path, harvest: str) -> bool:
    """Make the folder of a harvest, and return True if that harvest has finished there.

    Raises:
        Refused: the folder cannot be made, or holds something else than a harvest, or another one.
    """
    make_folder(out)
    if (out / MANIFEST).is_file():
        found = read_json(out / MANIFEST)
        if not isinstance(found, dict) or found.get("harvest") != harvest:
            raise _foreign(out)
        return True
    if not (out / NOTES).is_file() and any(out.iterdir()):
        raise _foreign(out)
    return False


def recalled(out: Path, harvest: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the header of a harvest's notes.

    Raises:
        Refused: they are of another harvest.
    """
    tensors, header = read_tensors(out / NOTES)
    if header.get("harvest") != harvest:
        raise _foreign(out)
    return tensors, header


def about(path: Path) -> dict[str, Any]:
    """Return the name, bytes and SHA-256 of a file, for a manifest."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_hash(path)}


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with its key."""
    return {**manifest, "key": manifest_key(manifest)}


def manifest_key(manifest: Mapping[str, Any]) -> str:
    """Return the hash of all that a manifest says."""
    return hash_text(repr(_plain({k: v for k, v in manifest.items() if k != "key"})))


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _plain(data: Any) -> Any:
    """Return the data as it comes back from JSON, its dictionaries in one order."""
    if isinstance(data, Mapping):
        return [(str(k), _plain(v)) for k, v in sorted(data.items())]
    return [_plain(v) for v in data] if isinstance(data, list | tuple) else data


def _foreign(out: Path) -> Refused:
    why = "it holds something else: a harvest of another model, other data or options, or other files"
    return Refused(f"folder {str(out)!r}", why, "choose a new one, or repeat the call that began there")
