"""Labelled texts and words on which a dictionary is probed: from files, or of the world that a model knows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from cutaway.core.refuse import Keyword, Refused
from cutaway.models.model import Model
from cutaway.zoo.miniworld.facts import RELATIONS
from cutaway.zoo.miniworld.words import all_words

WORLD = "world"
MOST, FEWEST = 6, 12  # concepts probed at most; texts that show one at least


def labelled(spec: str, model: Model) -> tuple[list[str], list[str], Bool[Tensor, "text concept"]]:
    """Return texts, names of concepts, and which text shows which, from a .jsonl file or the model's `world`.

    A line of the file is {"text": …, "label": …}; a label is a word, true or false, or a list of words. The most
    frequent concepts are kept.

    Raises:
        Refused: no such file, a line of another form, no world, or no concept with enough texts on either side.
    """
    texts, labels = _of_world(model) if spec == WORLD and not Path(spec).exists() else _of_file(Path(spec))
    counts = Counter(x for own in labels for x in own)
    kept = [c for c, n in counts.most_common() if FEWEST <= n <= len(texts) - FEWEST][:MOST]
    if len(counts) == 2 and all(len(own) == 1 for own in labels):
        kept = kept[:1]  # the other one says the same
    if not kept:
        why = f"none of the {len(counts)} labels is on {FEWEST} texts or more and off as many"
        raise Refused(Keyword("labels", spec), why, "give more texts of each label")
    return texts, kept, torch.tensor([[c in own for c in kept] for own in labels])


def words(spec: str, model: Model) -> list[str]:
    """Return the words of a file, or those that the tokenizer of a `world` knows.

    Raises:
        Refused: no such file, or no world.
    """
    if spec == WORLD and not Path(spec).exists():
        _world(model, "words=world")
        return list(all_words())
    return _read(Path(spec), "words").split()


def _of_world(model: Model) -> tuple[list[str], list[set[str]]]:
    """Return prompts that ask which instrument a person plays, labelled with it: what the model has to recall.

    The people play one of the four most frequent instruments, so that each is about a quarter of the texts.
    """
    world, template = _world(model, "labels=world"), RELATIONS["instrument"][0]
    counts = Counter(p.facts["instrument"] for p in world.people)
    kept = {name for name, _ in counts.most_common(4)}
    people = [p for p in world.people if p.facts["instrument"] in kept]
    return [template.format(s=p.name) for p in people], [{p.facts["instrument"]} for p in people]


def _world(model: Model, what: str) -> Any:
    if model.world is None:
        raise Refused(what, "only models of the zoo have a world whose facts are known", "give a file")
    return model.world


def _of_file(path: Path) -> tuple[list[str], list[set[str]]]:
    texts, labels = [], []
    for n, line in enumerate(_read(path, "labels").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = row["text"], row["label"]
        except (ValueError, KeyError, TypeError):
            why = f'line {n} is not {{"text": …, "label": …}}'
            raise Refused(Keyword("labels", path), why, "write one such line per text") from None
        texts.append(str(text))
        labels.append({str(x) for x in label} if isinstance(label, list) else {str(label)})
    return texts, labels


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = "; of a zoo model: world" if option in ("labels", "words") else ""
        raise Refused(f"{option}={path}", f"it cannot be read: {error}", f"give a text file{near}") from error
