"""Dictionaries on disk in the formats of many tools: recognised by content, read, and written.

Each file of this folder is one format, found there, with three functions: `detect(files)`, `read(files, **choices)` and
`write(dictionary, path)`. What a format's files leave open is a choice; a choice that was not made is asked for.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from cutaway.core.refuse import Keyword, Refused, nearest
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import Files
from cutaway.dictionaries.formats.shared.located import located, pinned
from cutaway.dictionaries.provenance import loaded


def names() -> list[str]:
    """Return the name of every format: the files of this folder."""
    return sorted(m.name for m in iter_modules(__path__) if not m.ispkg)


@dataclass(frozen=True)
class L0Check:
    """Measured and declared mean number of active latents per token; they agree within `factor`."""

    measured: float
    declared: float
    factor: float = 2.0

    @property
    def agrees(self) -> bool:
        """True if the two are within the factor."""
        return self.declared / self.factor <= self.measured <= self.declared * self.factor


def load(path: str | Path, format: str | None = None, **choices: Any) -> Dictionary:
    """Return the dictionary at a path (a folder or a file) in whatever format it is.

    Where nothing lies at the path, it may name one of the zoo (`miniworld/transcoders`), or a repository of the Hugging
    Face hub and a folder in it (`org/repo`, `org/repo/layer_20/width_16k`), from which only what is needed is fetched.

    `choices` settle what the format's files leave open, such as `site="resid_post.6"`; a refusal asks for what is
    needed. `format` names the format where the content fits several.

    Raises:
        Refused: nothing there, no known format, several that fit, or an open question.
    """
    files, given = Files(located(path)), format
    if format is None:
        fitting, trouble = _fitting(files)
        if trouble is not None and not fitting:
            raise trouble
        if not fitting:
            seen = ", ".join(files.matching("*", "*/*")[:8]) or "no file"
            raise Refused(f"path {str(path)!r}", f"no known format fits ({seen})", f"formats: {', '.join(names())}")
        if len(fitting) > 1:
            raise Refused(
                f"path {str(path)!r}", f"it may be {' or '.join(fitting)}", ("say which: ", Keyword("format"))
            )
        format = fitting[0]
    read = module(format).read
    allowed = [n for n, p in inspect.signature(read).parameters.items() if p.kind is p.KEYWORD_ONLY]
    strange = [n for n in choices if n not in allowed]
    if strange:
        way = f"it leaves open: {', '.join(allowed) or 'nothing'}"
        raise Refused(f"choice {strange[0]!r}", f"format {format} does not leave that open", way)
    found = read(files, **choices)
    return loaded(replace(found, about=found.about | {"path": str(path)}), pinned(path, files), given, choices)


def write(dictionary: Dictionary, path: str | Path, format: str, **options: Any) -> Path:
    """Write a dictionary in a named format; returns where.

    Raises:
        Refused: no such format, or one that cannot hold this dictionary.
    """
    return module(format).write(dictionary, path, **options)


def detect(path: str | Path) -> list[str]:
    """Return the formats that the content of a path fits, or of what a name as for `load` leads to."""
    return _fitting(Files(located(path)))[0]


def _fitting(files: Files) -> tuple[list[str], Refused | None]:
    """Return the formats that fit, and the first thing that could not be looked into: it may be another tool's own."""
    found, trouble = [], None
    for name in names():
        try:
            if module(name).detect(files):
                found.append(name)
        except Refused as refusal:
            trouble = trouble or refusal
    return found, trouble


def module(name: str) -> Any:
    """Return the module of one format.

    Raises:
        Refused: there is none of that name.
    """
    if name not in names():
        close = nearest(name, names())
        raise Refused(
            f"format {name!r}",
            "it is not known" + (f"; near: {close}" if close else ""),
            f"use one of: {', '.join(names())}",
        )
    return import_module(f"cutaway.dictionaries.formats.{name}")


def l0_check(dictionary: Dictionary, acts: Any, declared: float | None = None, factor: float = 2.0) -> L0Check:
    """Compare a dictionary's measured L0 on activations with the declared one, to check a doubtful reading.

    `declared` is taken from `dictionary.about` if it is not given. They agree within a factor.

    Raises:
        Refused: no declared L0, or no tokens.
    """
    declared = declared if declared is not None else dictionary.about.get("declared_l0")
    if declared is None or declared <= 0:
        raise Refused("l0_check", "no L0 was declared in the dictionary's files", "give declared=")
    counts = dictionary.encode(acts).counts().double()
    if len(counts) == 0:
        raise Refused("l0_check", "there are no tokens", "give activations")
    return L0Check(float(counts.mean()), float(declared), factor)
