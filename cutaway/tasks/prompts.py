"""Prompts without an answer, and two sets of them to contrast: what a method is about that asks no question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cutaway.core.record import hash_text
from cutaway.core.refuse import Refused
from cutaway.core.repeat import Made


@dataclass(frozen=True)
class Prompts:
    """Texts that a model reads, of one kind.

    Attributes:
        texts: the prompts.
        name: what they are, in a word.
        made: how they can be made again; None if made by hand.
    """

    texts: tuple[str, ...]
    name: str = "prompts"
    made: Made | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if not self.texts or not all(self.texts):
            raise Refused(f"prompts {self.name!r}", "there is none, or one is empty", "give at least one text")

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def identity(self) -> dict[str, Any]:
        """Say in a record which data these are."""
        return {"name": self.name, "hash": hash_text(*self.texts), "prompts": len(self.texts)}

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"prompts": len(self.texts)}

    def split(self) -> list[Prompts]:
        """Return each prompt alone."""
        return [replace(self, texts=(t,), made=None) for t in self.texts]


@dataclass(frozen=True)
class Contrast:
    """Two sets of prompts that differ in what is asked about: with it (`positive`) and without (`negative`)."""

    positive: Prompts
    negative: Prompts
    made: Made | None = field(default=None, repr=False, compare=False)

    def identity(self) -> dict[str, Any]:
        """Say in a record which data these are."""
        return {"positive": self.positive.identity(), "negative": self.negative.identity()}

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of; `prompts` counts both sets."""
        return {"prompts": len(self.positive) + len(self.negative)}


def read_prompts(source: str | Path) -> Prompts:
    """Read prompts from a text file, one per line, or take the one prompt that `source` is.

    Raises:
        Refused: a file that is missing, or has no line.
    """
    path = Path(source)
    if path.suffix != ".txt":
        text = str(source)
        return Prompts((text,), made=Made(f"ca.tasks.Prompts(({text!r},))", {"": text}))
    if not path.is_file():
        raise Refused(f"prompts {str(source)!r}", "there is no such file", "give a .txt file with a prompt per line")
    texts = tuple(line for line in path.read_text("utf-8").splitlines() if line.strip())
    whole = str(path.absolute())
    return Prompts(texts, path.stem, Made(f"ca.tasks.read_prompts({whole!r})", {"": whole}))


def contrast(positive: Prompts, negative: Prompts) -> Contrast:
    """Set two sets of prompts side by side, remembering how each can be made again."""
    one, other = positive.made, negative.made
    if one is None or other is None:
        return Contrast(positive, negative)
    flags = {"positive": one.flags[""], "negative": other.flags[""]}
    return Contrast(positive, negative, Made(f"ca.tasks.contrast({one.python}, {other.python})", flags))


def joined(parts: Sequence[Prompts]) -> Prompts:
    """Make one set of several."""
    return Prompts(tuple(t for p in parts for t in p), parts[0].name)
