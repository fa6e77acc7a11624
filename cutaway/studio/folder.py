"""The folder of a studio: its jobs, its results, and the files that may be opened by their ids.

A page never names a path. What the command line gave (`--open FILE`), what was uploaded and what was computed has an
id; a value `file:ID` in a form means that file, and any other value that names a place on disk is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from cutaway import zoo
from cutaway.core.refuse import Keyword, Refused

PREFIX = "file:"
_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,79}")
_FILE = re.compile(r"\.(jsonl?|txt|md|safetensors|gguf|pt|pth|bin|npz?|csv|html|sqlite)$", re.IGNORECASE)
_KNOWN = re.compile(r"(mini)?world/[\w-]+(\.\w+)*")  # texts and dictionaries that ship with the package
_STORE = "manifest.json"


@dataclass(frozen=True)
class Folder:
    """The places of a studio.

    Attributes:
        path: the folder.
        files: the files and folders that have an id.
    """

    path: Path
    files: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, files: Iterable[Path] = ()) -> Folder:
        """Make the folder, and give each file an id made of its name.

        Raises:
            Refused: the folder cannot be made, or a file is not there.
        """
        given: dict[str, Path] = {}
        for file in files:
            if not file.exists():
                raise Refused(Keyword("open", str(file)), "there is no such file or folder", "look at its name")
            stem = re.sub(r"[^a-z0-9]+", "-", file.name.lower()).strip("-")[:60] or "file"
            name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 1000))) if n not in given)
            given[name] = file.absolute()
        made = cls(path.expanduser().absolute(), given)
        try:
            for each in (made.results, made.resumed, made.empty, made.stores, made.groups):
                each.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"it cannot be written in ({error.strerror})"
            raise Refused(Keyword("folder", str(path)), why, "name another") from error
        return made

    @property
    def results(self) -> Path:
        """The folder of results."""
        return self.path / "results"

    @property
    def stores(self) -> Path:
        """The folder of stores of features."""
        return self.path / "stores"

    @property
    def groups(self) -> Path:
        """The folder of groups of graphs' units."""
        return self.path / "groups"

    def new_group(self, name: str) -> Path:
        """Return the file that new groups will lie in."""
        return self.groups / f"{self._id(name)}.json"

    def store_names(self) -> list[str]:
        """Return the ids of folders that may be stores of features: those that were opened, then those made here."""
        given = [n for n, p in self.files.items() if (p / _STORE).is_file()]
        return given + sorted(p.name for p in self.stores.iterdir() if (p / _STORE).is_file())

    def store(self, name: str) -> Path:
        """Return the folder of the store with this id.

        Raises:
            Refused: no such store.
        """
        if name in self.store_names():
            return self.files.get(name, self.stores / name)
        raise Refused(f"store {name!r}", "there is no such store", "choose one of the list, or harvest one")

    def new_store(self, name: str) -> Path:
        """Return the folder that a new store will lie in."""
        return self.stores / self._id(name)

    @property
    def resumed(self) -> Path:
        """The folder in which interrupted sweeps keep what they have done."""
        return self.path / "resumed"

    @property
    def empty(self) -> Path:
        """The empty folder in which workers run, so that no relative name means a file."""
        return self.path / "empty"

    @property
    def database(self) -> Path:
        """The database of jobs."""
        return self.path / "studio.sqlite"

    def result(self, name: str) -> Path:
        """Return the file of the result with this id.

        Raises:
            Refused: no id, or no such result.
        """
        if _ID.fullmatch(name) and (file := self.results / f"{name}.safetensors").is_file():
            return file
        raise Refused(f"result {name!r}", "there is no such result", "choose one of the list of runs")

    def new_result(self, name: str) -> Path:
        """Return the file that a new result will lie in."""
        return self.results / f"{self._id(name)}.safetensors"

    @staticmethod
    def _id(name: str) -> str:
        if not _ID.fullmatch(name):
            raise Refused(f"id {name!r}", "that is none", "use letters, digits and hyphens")
        return name

    def placed(self, name: str, value: Any) -> Any:
        """Return a value of a form with the file that its id means; other values stay as they are.

        Raises:
            Refused: an unknown id, or a value that names a place on disk.
        """
        if not isinstance(value, str):
            return value
        if value.startswith(PREFIX):
            wanted = value.removeprefix(PREFIX)
            if (file := self.files.get(wanted)) is not None:
                return str(file)
            made = (self.results / f"{wanted}.safetensors", self.groups / f"{wanted}.json")
            if _ID.fullmatch(wanted) and (file := next((p for p in made if p.is_file()), None)) is not None:
                return str(file)
            raise Refused(
                Keyword(name, value), "no file has that id", f"the files are {', '.join(self.files) or 'none'}"
            )
        if any(map(_is_place, re.split(r"[,=?]", value))):
            raise Refused(
                Keyword(name, value),
                "the page opens files by their id only",
                "start the studio with --open FILE, and choose it in the list",
            )
        return value


@cache
def shipped(name: str) -> bool:
    """Return True for the name of a dictionary that ships with the package."""
    return any(name in zoo.dictionaries(model) for model in zoo.ENTRIES)


def _is_place(text: str) -> bool:
    text = text.strip()
    if not text or _KNOWN.fullmatch(text) or shipped(text):
        return False
    if text.startswith(("~", "/", "\\", ".")) or _FILE.search(text) or re.match(r"[A-Za-z]:[\\/]", text):
        return True
    return ("/" in text or "\\" in text) and not re.search(r"\s", text)
