"""Labelled texts and words, from files or of the world that a model knows; the subjects `labelled` and `words`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cutaway.core.record import hash_text
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.repeat import Made
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.models.model import Model
from cutaway.tasks.chat import chat

WORLD = "world"
MOST, FEWEST = 6, 12  # concepts kept at most; texts that show one at least
_Rows = tuple[list[str], list[tuple[str, ...]], tuple[str, ...], tuple[str, ...]]  # texts, labels, groups, prompts


@dataclass(frozen=True, eq=False)
class Labelled:
    """Texts of which it is known which concepts they show.

    Attributes:
        texts: the texts.
        concepts: names of the concepts.
        shown: True where a text shows a concept, [text, concept].
        groups: the group of each text, such as its template: what is fitted on some groups is tested on others. Empty
            if every text is a group of its own.
        prompts: the prompt that each text begins with, where the rest is a response to it. Empty if texts are whole.
        made: how they can be made again; None if made by hand.
    """

    texts: tuple[str, ...]
    concepts: tuple[str, ...]
    shown: Bool[Tensor, "text concept"]
    groups: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    made: Made | None = field(default=None, repr=False)

    def __post_init__(self):
        if tuple(self.shown.shape) != (len(self.texts), len(self.concepts)):
            why = f"`shown` is {list(self.shown.shape)}, for {len(self.texts)} texts and {len(self.concepts)} concepts"
            raise Refused("labelled texts", why, "give a row per text and a column per concept")
        if len(self.groups) not in (0, len(self.texts)):
            why = f"there are {len(self.groups)} groups for {len(self.texts)} texts"
            raise Refused("labelled texts", why, "give a group per text, or none")
        if len(self.prompts) not in (0, len(self.texts)):
            why = f"there are {len(self.prompts)} prompts for {len(self.texts)} texts"
            raise Refused("labelled texts", why, "give every text one, or none")
        for text, prompt in zip(self.texts, self.prompts, strict=False):
            if not text.startswith(prompt) or not prompt.strip() or not text[len(prompt) :].strip():
                why = f"{text!r:.60} is not the prompt {prompt!r:.60} and a response"
                raise Refused("labelled texts", why, "give texts that begin with their prompts and go on")

    def identity(self) -> dict[str, Any]:
        """Say in a record which data these are."""
        marks = ["".join("01"[int(x)] for x in row) for row in self.shown.tolist()]
        found = {"texts": len(self.texts), "concepts": list(self.concepts)}
        found |= {"groups": len(set(self.groups))} if self.groups else {}
        return found | {"hash": hash_text(*self.texts, *marks, *self.groups, *self.prompts)}

    def of_groups(self, *groups: str) -> Labelled:
        """Return the texts of some groups.

        Raises:
            Refused: no group, or one that has no text.
        """
        if not groups or (missing := sorted(set(groups) - set(self.groups))):
            why = f"no text is of {', '.join(missing)}" if groups else "none is named"
            raise Refused(f"groups of {len(self.texts)} texts", why, f"use {', '.join(dict.fromkeys(self.groups))}")
        own = [i for i, g in enumerate(self.groups) if g in groups]
        texts, names, prompts = (tuple(x[i] for i in own if x) for x in (self.texts, self.groups, self.prompts))
        return Labelled(texts, self.concepts, self.shown[own], names, prompts)

    def concept(self, name: str | None = None) -> int:
        """Return the number of a concept by its name; None means the first.

        Raises:
            Refused: no such concept.
        """
        if name is None or name in self.concepts:
            return 0 if name is None else self.concepts.index(name)
        raise Refused(Keyword("concept", name), f"the texts are labelled with {', '.join(self.concepts)}", "name one")

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each text's group; of a text that is a group of its own, the text."""
        return self.groups or self.texts

    @property
    def group_of(self) -> Int[Tensor, "text"]:
        """The number of each text's group."""
        number = {g: i for i, g in enumerate(dict.fromkeys(self.groups))}
        return torch.tensor([number[g] for g in self.groups]) if self.groups else torch.arange(len(self.texts))

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of; `bytes` are those of all texts in UTF-8."""
        size = sum(len(t.encode()) for t in self.texts)
        return {"texts": len(self.texts), "concepts": len(self.concepts), "bytes": size}


@dataclass(frozen=True)
class Words:
    """Words that a model is asked about one by one.

    Attributes:
        words: the words.
        made: how they can be made again; None if made by hand.
    """

    words: tuple[str, ...]
    made: Made | None = field(default=None, repr=False, compare=False)

    def identity(self) -> dict[str, Any]:
        """Say in a record which data these are."""
        return {"words": len(self.words), "hash": hash_text(*self.words)}

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"words": len(self.words)}


def read_labelled(source: str | Path, model: Model) -> Labelled:
    """Read labelled texts from a .jsonl file, or take those of the model's `world`.

    A line of the file is {"text": …, "label": …}; a label is a word, true or false, or a list of words, and every line
    may have a "group". In place of the text every line may have a "prompt" and a "response"; messages as a prompt are
    written in the model's chat template. The most frequent concepts are kept. `world/NAME` is a property of the world,
    such as `world/sentiment`.

    Raises:
        Refused: no such file, a line of another form, no world, or no concept with enough texts on either side.
    """
    of_world = _of_world(source)
    texts, labels, groups, prompts = _of_model(str(source), model) if of_world else _of_file(Path(source), model)
    counts = Counter(x for own in labels for x in own)
    kept = [c for c, n in counts.most_common() if FEWEST <= n <= len(texts) - FEWEST][:MOST]
    if len(counts) == 2 and all(len(own) == 1 for own in labels):
        kept = kept[:1]  # the other one says the same
    if not kept:
        why = f"none of the {len(counts)} labels is on {FEWEST} texts or more and off as many"
        raise Refused(Keyword("labels", source), why, "give more texts of each label")
    shown = torch.tensor([[c in own for c in kept] for own in labels])
    return Labelled(tuple(texts), tuple(kept), shown, groups, prompts, _made("read_labelled", source, of_world))


def read_words(source: str | Path, model: Model) -> Words:
    """Read the words of a file, or take those that the tokenizer of a `world` knows.

    Raises:
        Refused: no such file, or no world.
    """
    of_world = _of_world(source)
    found = _world(model, Keyword("words", WORLD)).words() if of_world else _read(Path(source), "words").split()
    return Words(tuple(found), _made("read_words", source, of_world))


def _of_world(source: str | Path) -> bool:
    return str(source).partition("/")[0] == WORLD and not Path(source).exists()


def _of_model(source: str, model: Model) -> _Rows:
    """Return the texts of a property of the model's world with their labels and groups."""
    world, (_, _, name) = _world(model, Keyword("labels", WORLD)), source.partition("/")
    texts, labels, groups = world.labelled(name) if name else world.labelled()
    return texts, [(label,) for label in labels], tuple(groups), ()


def _world(model: Model, what: Keyword) -> Any:
    if model.world is None:
        raise Refused(what, "only models of the zoo have a world whose facts are known", "give a file")
    return model.world


def _made(function: str, source: str | Path, of_world: bool) -> Made:
    whole = str(source) if of_world else str(Path(source).absolute())
    return Made(f"ca.tasks.{function}({whole!r}, model)", {"": whole})


def _of_file(path: Path, model: Model) -> _Rows:
    rows, what = list[tuple[str, tuple[str, ...], str | None, str | None]](), Keyword("labels", path)
    for n, line in enumerate(_read(path, "labels").splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(_of_line(json.loads(line), model))
        except (ValueError, KeyError, TypeError):
            why = f'line {n} is not {{"text": …, "label": …}}, nor {{"prompt": …, "response": …, "label": …}}'
            raise Refused(what, why, "write one such line per text") from None
    columns = zip(*rows, strict=True) if rows else [()] * 4
    texts, labels, groups, prompts = (tuple(x for x in own if x is not None) for own in columns)
    for name, some in (("group", groups), ("prompt", prompts)):
        if len(some) not in (0, len(texts)):
            raise Refused(what, f"{len(some)} of {len(texts)} lines have a {name}", "give every line one, or none")
    return list(texts), list(labels), groups, prompts


def _of_line(row: dict[str, Any], model: Model) -> tuple[str, tuple[str, ...], str | None, str | None]:
    """Return the text, the labels, the group and the prompt of a line, with None for what it does not have."""
    label, prompt, group = row["label"], row.get("prompt"), row.get("group")
    labels = tuple(dict.fromkeys(map(str, label))) if isinstance(label, list) else (str(label),)
    if prompt is None:
        return str(row["text"]), labels, None if group is None else str(group), None
    begun = prompt if isinstance(prompt, str) else str(chat(model, prompt))
    return begun + str(row["response"]), labels, None if group is None else str(group), begun


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = f"it cannot be read: {error}"
        raise Refused(f"{option}={path}", why, "give a text file; of a zoo model: world") from error


def _example_labelled(opened: Mapping[str, Any]) -> Labelled:
    """Sentences about two places, labelled with the place and with one of the names."""
    names, places = ("Mary", "John", "Anna", "Peter", "Tom", "Lucy", "Paul", "Emma"), ("store", "park")
    texts = tuple(f"{a} and {b} went to the {p}" for a in names for b in names[:4] if a != b for p in places)
    concepts = ("park", names[0])
    return Labelled(texts, concepts, torch.tensor([[c in t for c in concepts] for t in texts]))


def _example_words(opened: Mapping[str, Any]) -> Words:
    """Words that end in their first letter, so that any model tells it at their end."""
    return Words(tuple(f"{x}{a}{b}{x}" for x in "jqxz" for a in "aeiou" for b in "aeioubd"))


_TEXTS = (
    f"texts with labels: .jsonl with text and label (and group); or {WORLD}, the facts of a zoo model's world, or "
    f"{WORLD}/NAME, such as {WORLD}/sentiment"
)
LABELLED = register(
    Subject(
        "labelled",
        Labelled,
        (Flag("labelled", str, REQUIRED, _TEXTS),),
        lambda flags, opened: read_labelled(flags["labelled"], opened["model"]),
        _example_labelled,
        needs=("model",),
    )
)
WORDS = register(
    Subject(
        "words",
        Words,
        (Flag("words", str, REQUIRED, f"a file of words; or {WORLD}, those that a zoo model's tokenizer knows"),),
        lambda flags, opened: read_words(flags["words"], opened["model"]),
        _example_words,
        needs=("model",),
    )
)
