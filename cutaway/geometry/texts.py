"""Texts that several models read: the subject `texts`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from cutaway.core.record import hash_text
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.repeat import Made
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.streams.sources import TextFiles


@dataclass(frozen=True)
class Texts:
    """Texts that belong to no model, read one by one.

    Attributes:
        texts: the texts.
        made: how they can be made again; None if made by hand.
    """

    texts: tuple[str, ...]
    made: Made | None = field(default=None, repr=False, compare=False)

    def identity(self) -> dict[str, Any]:
        """Say in a record which data these are."""
        return {"texts": len(self.texts), "hash": hash_text(*self.texts)}

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"texts": len(self.texts)}


def read_texts(path: str | Path, most: int = 256) -> Texts:
    """Read the first lines of a text file as texts.

    Raises:
        Refused: no such file, or one without a line.
    """
    if not Path(path).is_file():
        raise Refused(Keyword("texts", path), "there is no such file", "give a text file with a text per line")
    found = tuple(islice((t for t in TextFiles((Path(path),), "line").read(0) if isinstance(t, str)), most))
    if not found:
        raise Refused(Keyword("texts", path), "it has no line", "give a text file with a text per line")
    whole = str(Path(path).absolute())
    more = {} if most == 256 else {"most": most}
    return Texts(found, Made(f"ca.geometry.read_texts({whole!r}, {most})", {"": whole, **more}))


def _accept(source: Any) -> Texts | None:
    """Take a list or tuple of texts in the place of `Texts`."""
    whole = isinstance(source, list | tuple) and bool(source) and all(isinstance(t, str) for t in source)
    return Texts(tuple(source)) if whole else None


def _example(opened: Mapping[str, Any]) -> Texts:
    names = ("Mary", "John", "Anna", "Peter")
    return Texts(tuple(f"When {a} and {b} went to the store, {b} gave it." for a in names for b in names if a != b))


register(
    Subject(
        "texts",
        Texts,
        (
            Flag("texts", str, REQUIRED, "a text file, of which every line is a text"),
            Flag("texts_most", int, 256, "number of lines that are read"),
        ),
        lambda flags, opened: read_texts(*flags.values()),
        _example,
        accept=_accept,
        advice="a list of texts",
    )
)
