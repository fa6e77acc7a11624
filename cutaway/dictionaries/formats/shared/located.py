"""Resolution of a dictionary's name: a local path, a dictionary of the zoo, or a folder of the Hugging Face hub.

Of a repository only the files that a dictionary can be read from are fetched: those of one folder, safetensors and npz
before PyTorch's own (which are always read as plain tensors). No code is ever fetched.
"""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path

from cutaway import zoo
from cutaway.core.refuse import Refused
from cutaway.dictionaries.formats.shared.files import PT, Files

#: org/repo, org/repo/folder, org/repo/folder/file, each with a revision if one is meant: org/repo@revision/folder
_REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w.-]+))?(?:/(.+))?")
_CONFIGS, _WEIGHTS = ("json", "yaml", "yml"), ("safetensors", "npz")
_BELOW = "checkpoints/final.safetensors"  # the one file that a format keeps in a folder of its own


def located(name: str | Path) -> Path:
    """Return the path on this machine that a name means; what is only on the hub is fetched.

    Raises:
        Refused: nothing of that name is here, and the hub does not have it or cannot be reached.
    """
    path, text = Path(name).expanduser(), Path(name).as_posix()
    if path.exists():
        return path
    shipped = zoo.dictionary(text)
    if shipped is not None:
        return shipped
    found = _REPOSITORY.fullmatch(text)
    local = str(name).startswith((".", "/", "~")) or ".." in text
    if found is None or local or Path(text.partition("/")[0]).exists():
        way = "give a folder or a file, a dictionary of the zoo, or org/repo[/folder] of the Hugging Face hub"
        raise Refused(f"path {str(name)!r}", "there is nothing", way)
    return _fetched(text, found[1], found[2], found[3] or "")


def pinned(name: str | Path, files: Files) -> str:
    """Return the name of a place that means the same for good: of the hub, with the commit that was fetched."""
    found = _REPOSITORY.fullmatch(Path(name).as_posix())
    parts = files.root.parts
    if found is None or "snapshots" not in parts or Path(name).expanduser().exists():
        return str(name)
    commit = parts[len(parts) - parts[::-1].index("snapshots")]
    return f"{found[1]}@{commit}" + (f"/{found[3]}" if found[3] else "")


def _fetched(name: str, repository: str, revision: str | None, inside: str) -> Path:
    named = inside.endswith((*_WEIGHTS, *PT))
    folder = inside.rpartition("/")[0] if named else inside
    at = escape(folder) + "/" if folder else ""
    wanted = [escape(inside)] if named else [f"{at}*.{end}" for end in _WEIGHTS]
    wanted += [f"{at}*.{end}" for end in _CONFIGS]
    if folder:
        wanted.append(f"{at.rpartition('/')[0].rpartition('/')[0]}/config.json".lstrip("/"))
    root = _snapshot(name, repository, revision, wanted, [f"{at}*/*"])
    if not any(p.suffix[1:] in _WEIGHTS or p.suffix in PT for p in (root / folder).glob("*")):
        _snapshot(name, repository, revision, [*(f"{at}*{end}" for end in PT), f"{at}{_BELOW}"], [f"{at}*/*/*"])
    if not (root / inside).exists():
        why = f"the repository has no {inside}, or nothing in it is a dictionary's"
        raise Refused(f"dictionary {name!r}", why, "look at its files on the hub")
    return root / inside


def _snapshot(name: str, repository: str, revision: str | None, wanted: list[str], unwanted: list[str]) -> Path:
    """Fetch the folder of a repository with the files wanted.

    Raises:
        Refused: no such repository, or it cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except errors.GatedRepoError:
        why, way = "its authors give access on request only", "ask for it on its page, and log in (hf auth login)"
    except errors.RepositoryNotFoundError:
        why, way = "neither is there such a path here nor such a repository on the hub", "check the name"
    except (errors.LocalEntryNotFoundError, ConnectionError):
        why = "there is no such path here, and the Hugging Face hub cannot be reached"
        way = "check the path, or fetch it where there is internet"
    except Exception as error:  # whatever else the network makes of it
        why, way = f"the Hugging Face hub did not answer: {str(error).splitlines()[0][:200]}", "try again"
    raise Refused(f"dictionary {name!r}", why, way)
