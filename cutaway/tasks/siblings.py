"""Sentences of the same form: the words that were exchanged become other words of their kind, in both prompts.

One sentence gives one number; the same question asked of its siblings says how far the finding generalises, and gives
it an interval. Siblings have as many tokens as the sentence, position by position.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from cutaway.core.again import Made
from cutaway.models.model import Model
from cutaway.tasks import words, world
from cutaway.tasks.answers import next_tokens, token_rows
from cutaway.tasks.pair import Pair
from cutaway.tasks.task import Task, made

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class _Draft:
    """A pair under way: both prompts, and answer and foil where the renaming says what they become."""

    clean: str
    corrupt: str
    answer: str | None
    foil: str | None


def with_siblings(model: Model, task: Task, n: int = 16, seed: int = 0) -> Task:
    """The first pair of a task, and up to `n` − 1 pairs of the same form.

    The words told apart by the corruption, and all others of their kind in the sentence, are renamed consistently. If
    answer and foil are among them they are renamed too; otherwise they become what the model itself says next, if the
    pair's are that too, and a sibling whose two prompts do not differ in that is left out. A sentence whose exchanged
    words are of no known kind, or whose answer is not what the model says, has no siblings.
    """
    pair = task.pairs[0]
    family = _family(model, pair)
    if family is None or n < 2:
        return made(replace(task, pairs=(pair,)), _made(task, n, seed), model)
    drafts = _drafts(model, pair, family, 2 * n, random.Random(f"{seed}|{pair.clean}"))
    others = _answered(model, pair, drafts)[: n - 1] if drafts else []
    options = {**task.options, "siblings": len(others)}
    return made(replace(task, pairs=(pair, *others), options=options), _made(task, n, seed), model)


def _made(task: Task, n: int, seed: int) -> Made | None:
    """How a task with siblings is made again; flags do so for the task of one sentence."""
    how = task.after("")
    if how is None:
        return None
    why = "" if "sentence" in how.flags else f"no flag says with_siblings of task {task.name!r}"
    flags = {**how.flags, "siblings": n, "seed": seed or None}
    return replace(how, python=f"ca.tasks.with_siblings(model, {how.python}, {n!r}, {seed!r})", flags=flags,
                   no_flags=how.no_flags or why)  # fmt: skip


def _family(model: Model, pair: Pair) -> frozenset[str] | None:
    """The smallest set of words of one kind that holds every exchanged word, in lower case."""
    changed = {w.lower() for change in pair.changes() for w in change}
    digits = {len(w) for w in changed}
    if all(w.isdigit() for w in changed) and len(digits) == 1 and max(digits) <= 4:
        size = digits.pop()
        return frozenset(str(n) for n in range(10 ** (size - 1) if size > 1 else 0, 10**size))
    sets = [*words.kinds(), *(world.kinds(model.world) if getattr(model, "world", None) is not None else [])]
    found = [s for s in (frozenset(w.lower() for w in f) for f in sets) if changed and changed <= s]
    return min(found, key=len, default=None)


def _drafts(model: Model, pair: Pair, family: frozenset[str], most: int, rng: random.Random) -> list[_Draft]:
    said = [m[0].lower() for m in _WORD.finditer(f"{pair.clean} {pair.corrupt}")]
    renamed = [w for w in dict.fromkeys(said) if w in family]
    fresh = sorted(family - set(renamed))
    if len(fresh) < len(renamed):
        return []
    drafts = []
    for _ in range(4 * most):
        names = dict(zip(renamed, rng.sample(fresh, len(renamed)), strict=True))
        answer, foil = (_renamed(w, names) if w.strip().lower() in names else None for w in (pair.answer, pair.foil))
        drafts.append(_Draft(_renamed(pair.clean, names), _renamed(pair.corrupt, names), answer, foil))
    drafts = list(dict.fromkeys(drafts))
    length = len(token_rows(model, [pair.clean])[0])
    rows = token_rows(model, [t for d in drafts for t in (d.clean, d.corrupt)])
    fits = [len(a) == len(b) == length for a, b in zip(rows[::2], rows[1::2], strict=True)]
    return [d for d, fit in zip(drafts, fits, strict=True) if fit][:most]


def _answered(model: Model, pair: Pair, drafts: list[_Draft]) -> list[Pair]:
    """Drafts with both answers known and of one token each, as pairs.

    What the model says of a sibling answers the same question only if the pair's own answer is what the model says of
    it; otherwise there is no sibling. A foil that is not what it says of the corrupt prompt is kept as it is.
    """
    prompts = [pair.clean, pair.corrupt, *(t for d in drafts for t in (d.clean, d.corrupt))]
    tops = model.run_last(prompts).argmax(-1)
    said = [f" {t.strip()}" for t in model.token_texts(tops)[2:]]
    own = next_tokens(model, [pair.clean] * 2, [pair.follows(pair.answer), pair.follows(pair.foil)])
    usual, flips = ([int(top)] == ids for top, ids in zip(tops[:2], own, strict=True))
    out = []
    for d, says, instead in zip(drafts, said[::2], said[1::2], strict=True):
        if d.answer is None and not usual:
            continue
        answer, foil = d.answer or says, d.foil or (instead if flips else pair.foil)
        ids = next_tokens(model, [d.clean, d.clean], [answer, foil])
        if ids[0] != ids[1] and all(i is not None and len(i) == 1 for i in ids) and answer.strip() != foil.strip():
            out.append(Pair(d.clean, d.corrupt, answer, foil, _subject(pair, d), pair.group, joined=True))
    return out


def _subject(pair: Pair, d: _Draft) -> str | None:
    """The sibling's words where the pair's subject stands."""
    if pair.subject is None:
        return None
    old, new = _WORD.findall(pair.clean), _WORD.findall(d.clean)
    wanted = _WORD.findall(pair.subject)
    for i in range(len(old) - len(wanted) + 1):
        if [w.lower() for w in old[i : i + len(wanted)]] == [w.lower() for w in wanted]:
            return " ".join(new[i : i + len(wanted)])
    return None


def _renamed(text: str, names: dict[str, str]) -> str:
    def exchange(found: re.Match[str]) -> str:
        new = names.get(found[0].lower())
        return found[0] if new is None else new.capitalize() if found[0][:1].isupper() else new

    return _WORD.sub(exchange, text)
