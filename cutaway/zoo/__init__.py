"""Models that ship with the toolkit or are planted by it, with their truth known."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from cutaway.core.refuse import Refused, nearest


@dataclass(frozen=True)
class Entry:
    """A model of the zoo; its room offers `path()`, `World` and a recipe `train.train`."""

    name: str
    says: str

    @property
    def folder(self) -> Path:
        """The folder that transformers loads."""
        return self._module().path()

    @property
    def ready(self) -> bool:
        """True if its weights are present."""
        return (self.folder / "model.safetensors").exists()

    def world(self) -> Any:
        """Return the truth of its world."""
        return self._module().World.load()

    def train(self, out: Path, **options: Any) -> Path:
        """Train it again from its recipe."""
        return self._module(".train").train(out, **options)

    def _module(self, part: str = "") -> Any:
        return import_module(f"cutaway.zoo.{self.name}{part}")


#: the model of a command that names none
DEFAULT_MODEL = "miniworld"
ENTRIES: dict[str, Entry] = {
    "miniworld": Entry("miniworld", "people, countries, sums, days and moods in small English; every fact is known"),
}


def find(name: str) -> Entry | None:
    """Return the entry called `name`, if the zoo has one."""
    return ENTRIES.get(name)


def entry(name: str) -> Entry:
    """Return the entry called `name`.

    Raises:
        Refused: the zoo has no such model.
    """
    if name in ENTRIES:
        return ENTRIES[name]
    close = nearest(name, ENTRIES)
    why = "the zoo has no model of that name" + (f"; did you mean {close}?" if close else "")
    raise Refused(f"zoo model {name!r}", why, f"use one of: {', '.join(ENTRIES)}")


def dictionaries(model: str) -> list[str]:
    """Return the names of the dictionaries of a model that ship here, as `dictionary` takes them."""
    files = import_module(f"cutaway.zoo.{entry(model).name}.dictionaries").shipped()
    return [f"{model}/{name}" for name, file in files.items() if file.is_file()]


def dictionary(name: str) -> Path | None:
    """Return the file of a dictionary that ships here, by `model/name`; None if no model of that name is here.

    Raises:
        Refused: the model has no such dictionary.
    """
    model, _, which = name.partition("/")
    if model not in ENTRIES or not which:
        return None
    shipped = import_module(f"cutaway.zoo.{model}.dictionaries").shipped()
    if which not in shipped:
        raise Refused(f"dictionary {name!r}", "the zoo has none of that name", f"use {model}/ and {', '.join(shipped)}")
    return shipped[which]
