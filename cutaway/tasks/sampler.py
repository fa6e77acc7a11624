"""Pairs from template rows: drawn by a seed, kept where the model's tokenizer allows them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from cutaway.core.refuse import Code, Keyword, Refused
from cutaway.models.model import Model
from cutaway.tasks.answers import single_words
from cutaway.tasks.bound import askable
from cutaway.tasks.pair import Pair
from cutaway.tasks.templates import Corruption, Row, Template
from cutaway.tasks.words import Table, table

_SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?\}")
_TRIES = 12  # rounds of drawing before a task is refused


def sample(row: Row, model: Model, n: int, seed: int, corruption: Corruption) -> list[Pair]:
    """`n` distinct pairs of a template row, its templates in equal parts as far as the tokenizer allows.

    Every pair kept has equal token lengths, and answers of one token.

    Raises:
        Refused: the tokenizer allows too few.
    """
    rng = random.Random(f"{seed}|{row.name}")
    tables = _usable(row, model)
    kept: list[list[Pair]] = [[] for _ in row.templates]
    seen: set[Pair] = set()
    for _ in range(_TRIES):
        share = -(-n // (sum(map(bool, kept)) or len(kept)))
        new = [_new(row, t, tables, rng, corruption, share, seen) for t in row.templates]
        good = askable(model, [p for part in new for p in part])
        for part, more in zip(kept, new, strict=True):
            part.extend(p for p in more if p in good)
        if _ready(kept, n):
            break
    found = _dealt(kept, n)
    if len(found) < n:
        raise Refused(
            f"{n} prompts of task {row.name!r} for this tokenizer",
            f"only {len(found)} have pairs of equal token length and answers of one token",
            ("ask for ", Keyword("n", len(found), of="task"))
            if found
            else ("use another task, or ", Code("your own prompts through from_jsonl")),
        )
    return found


def _ready(kept: list[list[Pair]], n: int) -> bool:
    """Enough pairs, and as many of every template that gives any as its share."""
    alive = [len(part) for part in kept if part]
    return bool(alive) and sum(alive) >= n and min(alive) >= n // len(alive)


def _dealt(parts: list[list[Pair]], n: int) -> list[Pair]:
    """`n` pairs, taken from the templates in turn."""
    turns = [part[i] for i in range(max(map(len, parts), default=0)) for part in parts if i < len(part)]
    return turns[:n]


def _usable(row: Row, model: Model) -> dict[str, Table]:
    """Return the row's tables, reduced to rows of single tokens where enough of them are, so that positions line up."""
    draws = [[*{**row.draws, **template.draws}.values()] for template in row.templates]
    tables = {name: table(name) for each in draws for name in each}
    words = {n: t for n, t in tables.items() if all(w.isalpha() for r in t.rows for w in r)}
    single = single_words(model, list(dict.fromkeys(w for t in words.values() for r in t.rows for w in r)))
    for name, t in words.items():
        rows = tuple(r for r in t.rows if all(w in single for w in r))
        if len(rows) >= 2 * max(each.count(name) for each in draws):
            tables[name] = Table(t.columns, rows)
    return tables


def _new(
    row: Row,
    template: Template,
    tables: Mapping[str, Table],
    rng: random.Random,
    how: Corruption,
    n: int,
    seen: set[Pair],
) -> list[Pair]:
    """Up to `n` pairs of one template that were not drawn before, which `seen` remembers."""
    drawn = dict.fromkeys(_draw(row, template, tables, rng, how) for _ in range(n))
    found = [p for p in drawn if p is not None and p not in seen]
    seen.update(found)
    return found


def _draw(
    row: Row, template: Template, tables: Mapping[str, Table], rng: random.Random, how: Corruption
) -> Pair | None:
    """Draw a pair; None if the draw gives no question (answer and foil, or both prompts, are the same)."""
    draws = {**row.draws, **template.draws}
    words: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(draws.values()):
        mine = [d for d, t in draws.items() if t == name]
        t = tables[name]
        for d, chosen in zip(mine, rng.sample(t.rows, len(mine)), strict=True):
            words[d] = dict(zip(t.columns, chosen, strict=True))
    words |= {alias: words[d] for alias, d in row.same.items()}
    slots = (template.text, template.answer, template.foil, template.subject, template.answers, template.foils)
    clean, answer, foil, subject, right, wrong = (_written(slot or "", words, {}) for slot in slots)
    corrupt = _written(template.text, words, how.change)
    if clean == corrupt or answer == foil:
        return None
    sets = tuple(right.split()), tuple(wrong.split())
    return Pair(clean, corrupt, answer, foil, subject or None, template.group, *sets).literal()


def _written(text: str, words: Mapping[str, dict[str, str]], change: Mapping[str, str]) -> str:
    """Return a template with its slots filled, after `change` has put other slots in place of some."""
    return _SLOT.sub(lambda m: _word(words, change, m[1], m[2] or ""), text)


def _word(words: Mapping[str, dict[str, str]], change: Mapping[str, str], slot: str, column: str) -> str:
    key = f"{slot}.{column}" if column else slot
    name, _, other = (change.get(key) or change.get(slot) or slot).partition(".")
    return words[name][other or column or "word"]
