"""Pairs from template rows: drawn by a seed, kept where the model's tokenizer allows them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from cutaway.core.refuse import Refused
from cutaway.tasks.answers import next_tokens, single_words, token_rows
from cutaway.tasks.task import Pair
from cutaway.tasks.templates import Corruption, Row, Template
from cutaway.tasks.words import Table, table

_SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?\}")
_TRIES = 12  # rounds of drawing before a task is refused


def sample(row: Row, model: Any, n: int, seed: int, corruption: Corruption) -> list[Pair]:
    """`n` distinct pairs of a template row, its templates in equal parts as far as the tokenizer allows.

    Every pair kept has equal token lengths, and answers of one token.

    Raises:
        Refused: the tokenizer allows too few.
    """
    rng = random.Random(f"{seed}|{row.name}")
    tables = _usable(row, model)
    kept: list[dict[Pair, None]] = [{} for _ in row.templates]
    for _ in range(_TRIES):
        share = -(-n // max(1, sum(map(bool, kept)) or len(kept)))
        for part, template in zip(kept, row.templates, strict=True):
            drawn = (_draw(row, template, tables, rng, corruption) for _ in range(share))
            part.update(dict.fromkeys(p for p in drawn if p is not None))
        good = _allowed(model, [p for part in kept for p in part])
        kept = [{p: None for p in part if p in good} for part in kept]
        if _ready(kept, n):
            break
    found = _dealt([list(part) for part in kept], n)
    if len(found) < n:
        raise Refused(
            f"{n} prompts of task {row.name!r} for this tokenizer",
            f"only {len(found)} have pairs of equal token length and answers of one token",
            f"ask for n={len(found)}" if found else "use another task, or your own prompts through from_jsonl",
        )
    return found


def _ready(kept: list[dict[Pair, None]], n: int) -> bool:
    """Enough pairs, and as many of every template that gives any as its share."""
    alive = [len(part) for part in kept if part]
    return bool(alive) and sum(alive) >= n and min(alive) >= n // len(alive)


def _dealt(parts: list[list[Pair]], n: int) -> list[Pair]:
    """`n` pairs, taken from the templates in turn."""
    turns = [part[i] for i in range(max(map(len, parts), default=0)) for part in parts if i < len(part)]
    return turns[:n]


def _usable(row: Row, model: Any) -> dict[str, Table]:
    """The row's tables, reduced to rows of single tokens where enough of them are, so that positions line up."""
    draws = [[*{**row.draws, **template.draws}.values()] for template in row.templates]
    tables = {name: table(name) for each in draws for name in each}
    words = {n: t for n, t in tables.items() if all(w.isalpha() for r in t.rows for w in r)}
    single = single_words(model, list(dict.fromkeys(w for t in words.values() for r in t.rows for w in r)))
    for name, t in words.items():
        rows = tuple(r for r in t.rows if all(w in single for w in r))
        if len(rows) >= 2 * max(each.count(name) for each in draws):
            tables[name] = Table(t.columns, rows)
    return tables


def _draw(
    row: Row, template: Template, tables: Mapping[str, Table], rng: random.Random, how: Corruption
) -> Pair | None:
    """One pair; None where the draw gives no question (answer and foil, or both prompts, are the same)."""
    draws = {**row.draws, **template.draws}
    words: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(draws.values()):
        mine = [d for d, t in draws.items() if t == name]
        t = tables[name]
        for d, chosen in zip(mine, rng.sample(t.rows, len(mine)), strict=True):
            words[d] = dict(zip(t.columns, chosen, strict=True))

    def write(text: str | None, change: Mapping[str, str]) -> str:
        return _SLOT.sub(lambda m: _word(words, row.same, change, m[1], m[2]), text or "")

    clean, corrupt = write(template.text, {}), write(template.text, how.change)
    answer, foil = write(template.answer, {}), write(template.foil, {})
    if clean == corrupt or answer == foil:
        return None
    sets = (tuple(write(slot, {}).split()) for slot in (template.answers, template.foils))
    return Pair(clean, corrupt, answer, foil, write(template.subject, {}) or None, template.group, *sets)


def _word(
    words: Mapping[str, dict[str, str]], same: Mapping[str, str], change: Mapping[str, str], slot: str, column: str
) -> str:
    key = f"{slot}.{column}" if column else slot
    target = change.get(key) or change.get(slot) or slot
    name, _, other = target.partition(".")
    entry = words[same.get(name, name)]
    return entry[other or column or "word"]


def _allowed(model: Any, pairs: list[Pair]) -> set[Pair]:
    """The pairs of equal token length whose answer and foil are single tokens, different from each other."""
    if not pairs:
        return set()
    prompts = [p.clean for p in pairs]
    lengths = list(map(len, token_rows(model, [*prompts, *(p.corrupt for p in pairs)])))
    answers = next_tokens(model, prompts, [p.follows(p.answer) for p in pairs])
    foils = next_tokens(model, prompts, [p.follows(p.foil) for p in pairs])
    n = len(pairs)
    return {
        p
        for p, a, b, answer, foil in zip(pairs, lengths[:n], lengths[n:], answers, foils, strict=True)
        if a == b and answer and foil and len(answer) == len(foil) == 1 and answer != foil
    }
