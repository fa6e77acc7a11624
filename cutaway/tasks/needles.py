"""Needles: short texts hidden in long ones at several depths, and asked for at the end; the subject `needles`.

A needle is a sequence of random tokens, whose first two the end of the prompt says again, or a sentence of a file with
a question behind the text; either way the model should go on with what the needle says. The text around it is the
user's, a world's own sentences, or random tokens, and says none of the random needle's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.core.json_lines import numbered, parsed
from cutaway.core.record import hash_text
from cutaway.core.refuse import Call, Keyword, Refused
from cutaway.core.repeat import Made, called
from cutaway.core.stats import generator
from cutaway.core.subject import Flag, Subject, register
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens, batch
from cutaway.tasks.prompts import Prompts, read_prompts
from cutaway.tasks.repeats import beginning, ordinary_ids
from cutaway.tasks.world import sentences

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where needles lie, as shares of the text; the prompts take turns
_SAID = 2  # tokens of a random needle that the end of the prompt says again
_FORM = 'write lines {"needle": …, "question": …, "answer": …}'
_KEYS = ("needle", "question", "answer")


@dataclass(frozen=True)
class Asked:
    """A sentence to hide, a question about it, and the answer, which is a part of the sentence."""

    needle: str
    question: str
    answer: str


@dataclass(frozen=True)
class Hidden:
    """Prompts with needles as tokens of one model, the answers behind them.

    Attributes:
        tokens: the prompts with their answers.
        answer: the position in front of each of the answer's tokens, from which it is foreseen; −1 fills up.
        key: the position of the same token in the needle; −1 fills up.
        start: the position of the needle's first token.
        end: the position behind its last token.
        asks: the position of the first token of what asks for it.
        depth: the depth at which the needle lies, as an index of `DEPTHS`.
    """

    tokens: Tokens
    answer: Int[Tensor, "prompt step"]
    key: Int[Tensor, "prompt step"]
    start: Int[Tensor, "prompt"]
    end: Int[Tensor, "prompt"]
    asks: Int[Tensor, "prompt"]
    depth: Int[Tensor, "prompt"]

    def rows(self, chosen: Sequence[int]) -> Hidden:
        """Return some of the prompts."""
        parts = (getattr(self, n)[list(chosen)] for n in ("answer", "key", "start", "end", "asks", "depth"))
        return Hidden(self.tokens.rows(chosen), *parts)


@dataclass(frozen=True)
class Needles:
    """Needles in texts, one in each prompt, whose depths take turns.

    A beginning-of-text token stands before them where the tokenizer has one.

    Attributes:
        n: number of prompts.
        length: number of tokens of the text around a needle.
        size: number of tokens of a random needle.
        texts: the texts around the needles; None for sentences of the model's world, or without one random tokens.
        asked: sentences to hide in place of random tokens, in turn.
        seed: of what is drawn.
        made: how they can be made again; None if made by hand.
    """

    n: int = 20
    length: int = 32
    size: int = 8
    texts: Prompts | None = None
    asked: tuple[Asked, ...] = ()
    seed: int = 0
    made: Made | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.n < 2 * len(DEPTHS) or self.length < 1 or self.size <= _SAID:
            given = Call("Needles", {"n": self.n, "length": self.length, "size": self.size})
            why = f"each of {len(DEPTHS)} depths needs two prompts, a text a token, and a needle {_SAID + 1} tokens"
            raise Refused(given, why, "use for example 20, 32 and 8")

    def identity(self) -> dict[str, Any]:
        """Say in a record which data these are."""
        said = {"texts": self.texts.identity()} if self.texts is not None else {}
        lines = [getattr(a, k) for a in self.asked for k in _KEYS]
        said |= {"sentences": len(self.asked), "hash": hash_text(*lines)} if lines else {"size": self.size}
        return {"name": "needles", "prompts": self.n, "length": self.length, "seed": self.seed} | said

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"prompts": self.n}

    def bind(self, model: Model) -> Hidden:
        """Return the prompts as tokens of one model.

        Raises:
            Refused: too few texts or other tokens, a sentence without its answer, no tokenizer, or prompts longer than
                the model takes.
        """
        g, front, usual = generator(self.seed), beginning(model), ordinary_ids(model)
        around, asked = _Around(model, self, usual), [_as_tokens(model, a) for a in self.asked]
        rows, answers, places = list[list[int]](), list[int](), list[tuple[int, int, int, int]]()
        for i in range(self.n):
            text = around.draw(g)
            needle, question, answer = asked[i % len(asked)] if asked else self._random(usual, text, g)
            cut = around.cut(text, DEPTHS[i % len(DEPTHS)])
            rows.append([*front, *text[:cut], *needle, *text[cut:], *question, *answer])
            start, asks = len(front) + cut, len(front) + len(text) + len(needle)
            places.append((start, start + len(needle), asks, start + _found(answer, needle)))
            answers.append(len(answer))
        steps = torch.arange(max(answers))
        inside = steps < torch.tensor(answers)[:, None]
        start, end, asks, key = torch.tensor(places).T
        first = torch.tensor([len(row) - n - 1 for row, n in zip(rows, answers, strict=True)])
        answer, said = ((at[:, None] + steps).where(inside, -1) for at in (first, key))
        depth = torch.arange(self.n) % len(DEPTHS)
        return Hidden(model.tokens(batch(rows)), answer, said, start, end, asks, depth)

    def _random(self, usual: Tensor, text: list[int], g: torch.Generator) -> tuple[list[int], list[int], list[int]]:
        """Return a needle of random tokens that the text does not say, its first two, and the others."""
        pool = usual[~torch.isin(usual, torch.tensor(text))]
        if len(pool) < self.size:
            why = f"the vocabulary has {len(pool)} tokens that are neither special nor in the text"
            raise Refused(f"needles of {self.size} random tokens", why, "use shorter needles or texts")
        needle = pool[torch.randperm(len(pool), generator=g)[: self.size]].tolist()
        return needle, needle[:_SAID], needle[_SAID:]


class _Around:
    """Texts around needles: a number of tokens from a random sentence on, or random tokens."""

    def __init__(self, model: Model, needles: Needles, usual: Tensor):
        self.length, self.usual = needles.length, usual
        self.parts, self.closes = list[list[int]](), list[bool]()
        world = getattr(model, "world", None)
        if needles.texts is not None or world is not None:
            texts = sentences(world, needles.seed) if needles.texts is None else needles.texts.texts
            self.parts = [model.text.word_ids(text) for text in texts]
            ids = torch.tensor([i for part in self.parts for i in part]).unique()
            ends = [t.strip().endswith((".", "!", "?", ";")) for t in model.text.token_texts(ids)]
            self.closing = set(ids[torch.tensor(ends)].tolist())
            if (there := sum(map(len, self.parts))) < self.length:
                what, why = f"texts of {self.length} tokens", f"those given have {there} in all"
                raise Refused(what, why, "give longer texts, or ask for fewer tokens")

    def draw(self, g: torch.Generator) -> list[int]:
        """Return the next text."""
        if not self.parts:
            return self.usual[torch.randperm(len(self.usual), generator=g)[: self.length]].tolist()
        first, out = int(torch.randint(len(self.parts), (), generator=g)), list[int]()
        while len(out) < self.length:
            out += self.parts[first % len(self.parts)]
            first += 1
        return out[: self.length]

    def cut(self, text: list[int], depth: float) -> int:
        """Return the place of a needle: behind the end of a sentence that is nearest to the depth, if there is one."""
        ends = [i for i in range(1, len(text)) if self.parts and text[i - 1] in self.closing]
        wanted = depth * len(text)
        return min([0, *ends, len(text)], key=lambda i: abs(i - wanted)) if ends else round(wanted)


def _as_tokens(model: Model, asked: Asked) -> tuple[list[int], list[int], list[int]]:
    """Return the tokens of a sentence, its question and its answer."""
    needle, question, answer = (model.text.word_ids(getattr(asked, k)) for k in _KEYS)
    if _found(answer, needle) < 0:
        why = f"its tokens are not in a row in the needle {asked.needle!r}"
        raise Refused(f"answer {asked.answer!r}", why, "write it as the needle does, as whole words")
    return needle, question, answer


def _found(part: list[int], whole: list[int]) -> int:
    """Return the last place of some tokens in a row among others; −1 if there is none."""
    return next((i for i in range(len(whole) - len(part), -1, -1) if whole[i : i + len(part)] == part), -1)


def read_needles(
    n: int = 20,
    length: int = 32,
    size: int = 8,
    texts: str | Path | None = None,
    asked: str | Path | None = None,
    seed: int = 0,
) -> Needles:
    """Return needles in the texts of a file, as random tokens or sentences of a file.

    Args:
        n: number of prompts.
        length: number of tokens of the text around a needle.
        size: number of tokens of a random needle.
        texts: a .txt file with a text per line; else sentences of the model's world, or random tokens.
        asked: a .jsonl file with needle, question and answer; else random tokens.
        seed: of what is drawn.

    Raises:
        Refused: a file of another form, or numbers that leave nothing to ask.
    """
    around = None if texts is None else read_prompts(texts)
    told: dict[str, Any] = {"length": length, "size": size, "seed": seed}
    told |= {k: str(Path(v).absolute()) for k, v in (("texts", texts), ("asked", asked)) if v is not None}
    how = Made(called("ca.tasks.read_needles", repr(n), **told), {"": n, **told})
    return Needles(n, length, size, around, () if asked is None else _of_file(Path(asked)), seed, how)


def _of_file(path: Path) -> tuple[Asked, ...]:
    found = list[Asked]()
    try:
        for i, line in numbered(path):
            where = f"line {i} of {str(path)!r}"
            row = parsed(line, where, _FORM)
            if not isinstance(row, dict) or not all(row.get(k) and isinstance(row[k], str) for k in _KEYS):
                raise Refused(where, f"it is {line[:60]}", _FORM)
            found.append(Asked(*(row[k] for k in _KEYS)))
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(Keyword("asked", path, of="needles"), f"it cannot be read: {error}", _FORM) from error
    if not found:
        raise Refused(f"file {str(path)!r}", "it has no lines", _FORM)
    return tuple(found)


def _open(flags: Mapping[str, Any], opened: Mapping[str, Any]) -> Needles:
    return read_needles(flags["needles"], **{n.removeprefix("needles_"): v for n, v in flags.items() if n != "needles"})


register(
    Subject(
        "needles",
        Needles,
        (
            Flag("needles", int, 20, "number of prompts with a needle in a text, asked for at the end"),
            Flag("needles_length", int, 32, "number of tokens of the text around a needle"),
            Flag("needles_size", int, 8, "number of tokens of a random needle"),
            Flag("needles_texts", Path | None, None, "a .txt file of texts [default: of the model's world, or random]"),
            Flag("needles_asked", Path | None, None, "a .jsonl file with needle, question, answer [default: random]"),
            Flag("needles_seed", int, 0, "seed of what is drawn"),
        ),
        _open,
        lambda opened: Needles(10, 12, 4),
        advice="ca.tasks.Needles(), random tokens hidden in texts",
    )
)
