"""Models by name: one that ships with the toolkit, its truth known, and real ones that are fetched."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from cutaway.core.refuse import Refused, nearest
from cutaway.zoo.compiled.entry import entries as compiled_entries
from cutaway.zoo.entry import Entry
from cutaway.zoo.fetched import GEMMA3, SMOLLM2, Fetched
from cutaway.zoo.learned.entry import entries as learned_entries

#: the model of a command that names none
DEFAULT_MODEL = "miniworld"
ENTRIES: dict[str, Entry] = {
    "miniworld": Entry("miniworld", "people, countries, sums, days and moods in small English; every fact is known"),
    "induction": Entry("induction", "two layers of attention alone that learned to go on with a repeated block"),
    "shortcut": Entry("shortcut", "its twin, whose repeated blocks need no induction: no head of it is one"),
    "smollm2": SMOLLM2,
    "gemma3": GEMMA3,
    **compiled_entries(),
    **learned_entries(),
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


def fetchable(name: str) -> Fetched:
    """Return the entry called `name`, which can be fetched.

    Raises:
        Refused: the zoo has no such model, or it ships with the package.
    """
    found = entry(name)
    if not isinstance(found, Fetched):
        others = " or ".join(e.name for e in ENTRIES.values() if isinstance(e, Fetched))
        raise Refused(f"zoo model {name!r}", "it ships with the package", f"fetch {others}, or use it as it is")
    return found


def dictionaries(model: str) -> list[str]:
    """Return the names of the dictionaries of a model that ship here, as `dictionary` takes them."""
    return [f"{model}/{name}" for name, file in _shipped(entry(model)).items() if file.is_file()]


def dictionary(name: str) -> Path | None:
    """Return the file of a dictionary that ships here, by `model/name`; None if no model of that name is here.

    Raises:
        Refused: the model has no such dictionary.
    """
    model, _, which = name.partition("/")
    if model not in ENTRIES or not which:
        return None
    shipped = _shipped(ENTRIES[model])
    if which not in shipped:
        way = f"use {model}/ and {', '.join(shipped)}" if shipped else f"train one: cutaway dict train --model {model}"
        raise Refused(f"dictionary {name!r}", "the zoo has none of that name", way)
    return shipped[which]


def _shipped(model: Entry) -> dict[str, Path]:
    if type(model) is not Entry or find_spec(f"cutaway.zoo.{model.name}.dictionaries") is None:
        return {}
    files: dict[str, Path] = import_module(f"cutaway.zoo.{model.name}.dictionaries").shipped()
    return files
