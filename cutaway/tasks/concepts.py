"""Concepts as pairs of words that differ in one thing only (king, queen); the subject `concepts`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cutaway.core.json_lines import numbered, parsed
from cutaway.core.method import parse_list
from cutaway.core.record import hash_text
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.repeat import Made
from cutaway.core.subject import Flag, Subject, register
from cutaway.models.model import Model
from cutaway.tasks.words import table

_PAST = (
    "walk/walked talk/talked play/played look/looked work/worked call/called ask/asked open/opened turn/turned "
    "help/helped show/showed move/moved live/lived start/started want/wanted need/needed"
)
_MORE = (
    "big/bigger small/smaller fast/faster slow/slower high/higher low/lower long/longer short/shorter strong/stronger "
    "weak/weaker old/older young/younger cheap/cheaper great/greater bright/brighter dark/darker"
)
_WOMAN = (
    "king/queen man/woman boy/girl father/mother son/daughter brother/sister husband/wife uncle/aunt he/she his/her "
    "actor/actress prince/princess"
)
_ANTONYM = (
    "up/down day/night hot/cold rich/poor fast/slow old/young wet/dry hard/soft near/far light/dark black/white "
    "thick/thin early/late left/right full/empty high/low long/short happy/sad big/small open/closed love/hate "
    "first/last true/false inside/outside"
)
_SPANISH = (
    "table/mesa house/casa white/blanco milk/leche sun/sol hand/mano red/rojo water/agua bread/pan book/libro "
    "night/noche green/verde black/negro dog/perro cat/gato door/puerta friend/amigo king/rey moon/luna fire/fuego "
    "city/ciudad head/cabeza street/calle good/bueno"
)
#: concepts by name: a list of pairs, or two columns of a table of words
_KNOWN: dict[str, str | tuple[str, str, str]] = {
    "capital": ("countries", "country", "capital"),
    "language": ("countries", "country", "language"),
    "plural": ("nouns", "one", "many"),
    "past": _PAST,
    "more": _MORE,
    "woman": _WOMAN,
    "bad": ("feelings", "good", "bad"),
    "antonym": _ANTONYM,
    "spanish": _SPANISH,
}
_USUAL = "capital,language,plural,past,more,woman,bad"  # those that one direction of the unembedding may have
WORLD = "world"
_FEWEST = 3


@dataclass(frozen=True)
class Concepts:
    """Concepts, each with pairs of words: without it and with it.

    Attributes:
        names: the names of the concepts.
        pairs: the pairs of each.
        made: how they can be made again; None if made by hand.
    """

    names: tuple[str, ...]
    pairs: tuple[tuple[tuple[str, str], ...], ...]
    made: Made | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if not self.names or len(self.names) != len(self.pairs):
            why = f"there are {len(self.names)} names and pairs of {len(self.pairs)}"
            raise Refused("concepts", why, "give pairs of words for each name")

    def identity(self) -> dict[str, Any]:
        """Say in a record which data these are."""
        words = [w for own in self.pairs for pair in own for w in pair]
        return {"concepts": list(self.names), "pairs": [len(p) for p in self.pairs], "hash": hash_text(*words)}

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"concepts": len(self.names), "pairs": sum(map(len, self.pairs))}

    def ids(self, model: Model) -> dict[str, list[tuple[int, int]]]:
        """Return the token ids of each concept's pairs of single tokens; concepts with fewer than three are left out.

        Raises:
            Refused: no concept has three such pairs.
        """
        found = {n: _single(model, pairs) for n, pairs in zip(self.names, self.pairs, strict=True)}
        kept = {n: ids for n, ids in found.items() if len(ids) >= _FEWEST}
        if not kept:
            counts = ", ".join(f"{n} {len(ids)}" for n, ids in found.items())
            why = f"fewer than {_FEWEST} pairs of each are two single tokens: {counts}"
            raise Refused(f"concepts of {model.name}", why, "give pairs of words that are single tokens")
        return kept


def _single(model: Model, pairs: tuple[tuple[str, str], ...]) -> list[tuple[int, int]]:
    both = [tuple(model.text.word_ids(w) for w in pair) for pair in pairs]
    return list(dict.fromkeys((a[0], b[0]) for a, b in both if len(a) == len(b) == 1 and a != b))


def concepts(source: str | Path, model: Model | None = None) -> Concepts:
    """Return concepts by name, with commas between them, those of a .jsonl file, or the functions of a model's `world`.

    A line of the file is {"concept": …, "without": …, "with": …}.

    Raises:
        Refused: no such concept, a file of another form, or no world.
    """
    if str(source) == WORLD:
        return _of_world(model)
    if str(source).endswith(".jsonl"):
        return _of_file(Path(source))
    names = parse_list(str(source))
    if not names or (unknown := [n for n in names if n not in _KNOWN]):
        why = f"there is no concept {unknown[0]!r}" if names else "none is named"
        raise Refused(Keyword("concepts", source), why, f"use some of {', '.join(_KNOWN)}, or a .jsonl file")
    how = Made(f"ca.tasks.concepts({str(source)!r})", {"": str(source)})
    return Concepts(names, tuple(_known(n) for n in names), how)


def _known(name: str) -> tuple[tuple[str, str], ...]:
    row = _KNOWN[name]
    if isinstance(row, str):
        return tuple((a, b) for a, _, b in (pair.partition("/") for pair in row.split()))
    words, one, other = table(row[0]), *row[1:]
    return tuple((r[words.column(one)], r[words.column(other)]) for r in words.rows)


def _of_world(model: Model | None) -> Concepts:
    world = getattr(model, "world", None)
    if world is None:
        why = "only models of the zoo have a world whose words are known"
        raise Refused(Keyword("concepts", WORLD), why, "name concepts, or give a file")
    found = world.functions()
    needs = {"model": model.made.python if model is not None and model.made is not None else ""}
    how = Made(f"ca.tasks.concepts({WORLD!r}, model)", {"": WORLD}, needs=needs)
    return Concepts(tuple(found), tuple(map(tuple, found.values())), how)


def _of_file(path: Path) -> Concepts:
    found: dict[str, list[tuple[str, str]]] = {}
    form = 'write lines {"concept": …, "without": …, "with": …}'
    try:
        for n, line in numbered(path):
            where = f"line {n} of {str(path)!r}"
            row = parsed(line, where, form)
            if not isinstance(row, dict) or not all(
                isinstance(row.get(k), str) for k in ("concept", "without", "with")
            ):
                raise Refused(where, f"it is {json.dumps(row)[:60]}", form)
            found.setdefault(row["concept"], []).append((row["without"], row["with"]))
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(Keyword("concepts", path), f"it cannot be read: {error}", form) from error
    whole = str(path.absolute())
    how = Made(f"ca.tasks.concepts({whole!r})", {"": whole})
    return Concepts(tuple(found), tuple(map(tuple, found.values())), how)


def _example(opened: Mapping[str, Any]) -> Concepts:
    """Pair up the first words of a model that are single tokens: concepts without any meaning."""
    text, found = opened["model"].text, dict[int, str]()
    for word in text.token_texts(list(range(opened["model"].shape.d_vocab))):
        ids = text.word_ids(word.strip()) if word.strip().isalnum() else []
        if len(ids) == 1:
            found.setdefault(ids[0], word.strip())
        if len(found) == 16:
            break
    words = list(found.values())
    pairs = tuple(zip(words[::2], words[1::2], strict=True))
    return Concepts(("one", "other"), (pairs[:4], pairs[4:]))


_HELP = f"concepts, with commas: {', '.join(_KNOWN)}; a .jsonl file with concept, without and with; or world"
register(
    Subject(
        "concepts",
        Concepts,
        (Flag("concepts", str, _USUAL, _HELP),),
        lambda flags, opened: concepts(flags["concepts"], opened["model"]),
        _example,
        needs=("model",),
        advice='ca.tasks.concepts("plural,past")',
    )
)
