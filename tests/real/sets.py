"""The prompts of this room: one JSON-lines file a behaviour, as prompts, tokens and tasks."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cutaway as ca
from cutaway.tasks import Pair, Task
from cutaway.tasks.answers import continuation
from tools.real_dictionary import docstrings as written

FOLDER = Path(__file__).parent / "sets"


def rows(name: str) -> list[dict[str, Any]]:
    """The lines of one set."""
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]


def docstrings() -> list[str]:
    """Docstrings of the standard library, a text a module: English about other things than the sets."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return ["\n\n".join(written((library / f"{n}.py").read_text("utf-8"))) for n in ("difflib", "statistics")]


def pair(row: dict[str, Any]) -> Pair:
    """One line as a pair of prompts."""
    return Pair(row["prompt"], row["corrupt"], row["answer"], row["foil"], subject=row.get("subject"),
                group=row["group"], joined=row.get("joined", False))  # fmt: skip


def continued(p: Pair, word: str) -> str:
    """The text by which a pair's clean prompt goes on with any word."""
    return continuation(p.clean, word, p.joined)


def spread(name: str, n: int) -> list[dict[str, Any]]:
    """`n` lines of a set, evenly from every group in turn."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows(name):
        groups.setdefault(row["group"], []).append(row)
    turns = [g[i] for i in range(max(map(len, groups.values()))) for g in groups.values() if i < len(g)]
    return turns[:n]


def task(model: ca.Model, name: str, n: int, skip: int = 0) -> Task:
    """`n` pairs of a set as a task, measured at the first token in which answer and foil differ.

    Pairs whose prompts are not as long as each other in this model's tokens are left out.
    """
    pairs = [pair(row) for row in spread(name, len(rows(name)))]
    fit = [p for p in pairs if len(set(map(len, ids(model.tokenizer, [p.clean, p.corrupt])))) == 1]
    return Task(name, tuple(fit[skip : skip + n])).narrow(model)


def ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Each text's tokens, by the tokenizer alone."""
    return [tokenizer(text)["input_ids"] for text in texts]


def next_id(tokenizer: Any, prompt: str, text: str) -> int:
    """The first token by which a prompt goes on with a text, by the tokenizer alone."""
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + text)["input_ids"]
    assert whole[: len(before)] == before, (prompt, text)
    return whole[len(before)]
