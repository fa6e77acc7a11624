"""Prompts without an answer, and two sets of them to contrast: what a method is about that asks no question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cutaway.core.record import hash_text
from cutaway.core.refuse import Refused
from cutaway.core.repeat import Made
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens, batch


@dataclass(frozen=True)
class Prompts:
    """Texts that a model reads, of one kind.

    Attributes:
        texts: the prompts; "" where only token ids were given.
        name: what they are, in a word.
        made: how they can be made again; None if made by hand.
        ids: the token ids of each prompt, which are then read in place of its text; None if a model's tokenizer
            decides.
    """

    texts: tuple[str, ...]
    name: str = "prompts"
    made: Made | None = field(default=None, repr=False, compare=False)
    ids: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self):
        if not self.texts or not all(self.texts if self.ids is None else self.ids):
            raise Refused(f"prompts {self.name!r}", "there is none, or one is empty", "give at least one text")

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def identity(self) -> dict[str, Any]:
        """Say in a record which data these are."""
        read = self.texts if self.ids is None else [" ".join(map(str, row)) for row in self.ids]
        return {"name": self.name, "hash": hash_text(*read), "prompts": len(self.texts)}

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"prompts": len(self.texts)}

    def bind(self, model: Model) -> Tokens:
        """Return the prompts as tokens of one model.

        Raises:
            Refused: too long prompts, ids outside the vocabulary, or no tokenizer.
        """
        if self.ids is None:
            return model.tokens(list(self.texts))
        pieces = [tuple(model.text.token_texts(row)) for row in self.ids]
        return model.tokens(batch(self.ids, texts=self.texts, pieces=pieces))

    def take(self, n: int) -> Prompts:
        """Return the first `n` prompts."""
        ids = None if self.ids is None else self.ids[:n]
        return replace(self, texts=self.texts[:n], ids=ids, made=None)

    def split(self) -> list[Prompts]:
        """Return each prompt alone."""
        ids = [None] * len(self) if self.ids is None else [(row,) for row in self.ids]
        return [replace(self, texts=(t,), ids=row, made=None) for t, row in zip(self.texts, ids, strict=True)]


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


def as_prompts(source: str | Sequence[Any] | Tensor | Tokens) -> Prompts:
    """Return prompts from a text, a list of texts, token ids of one prompt or several, or tokens.

    Raises:
        Refused: it is none of these, or empty.
    """
    if isinstance(source, str):
        file = "a flag would take it as the name of a file" if source.endswith(".txt") else ""
        return Prompts((source,), made=_made(source, {"": source}, file))
    if isinstance(source, Tokens):
        rows = tuple(tuple(row.tolist()) for row in (i[m] for i, m in zip(source.ids, source.mask, strict=True)))
        return Prompts(source.texts, ids=rows, made=_made([list(r) for r in rows], {}, _IDS))
    values = source.tolist() if isinstance(source, Tensor) else list(source)
    if values and all(isinstance(v, str) for v in values):
        return Prompts(tuple(values), made=_made(values, {}, "no flag says several prompts; write them in a .txt file"))
    rows = values if values and all(isinstance(v, list | tuple) for v in values) else [values]
    if not all(type(i) is int for row in rows for i in row):
        why = "they are neither texts nor token ids"
        raise Refused(f"prompts {str(source)[:60]}", why, "give a text, a list of texts, or rows of token ids")
    ids = tuple(map(tuple, rows))
    return Prompts(("",) * len(ids), ids=ids, made=_made([list(r) for r in ids], {}, _IDS))


_IDS = "no flag says token ids"


def _made(source: Any, flags: dict[str, Any], no_flags: str) -> Made:
    return Made(f"ca.tasks.as_prompts({source!r})", flags, no_flags)


def read_prompts(source: str | Path) -> Prompts:
    """Read prompts from a text file, one per line, or take the one prompt that `source` is.

    Raises:
        Refused: a file that is missing, or has no line.
    """
    path = Path(source)
    if path.suffix != ".txt":
        return as_prompts(str(source))
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
    """Make one set of several, all of texts or all of token ids."""
    ids = None if parts[0].ids is None else tuple(row for p in parts for row in p.ids or ())
    return Prompts(tuple(t for p in parts for t in p), parts[0].name, ids=ids)
