"""Sentences of the same form: the words that were exchanged become other words of their kind, in both prompts.

One sentence gives one number; the same question asked of its siblings says how far the finding generalises, and gives
it an interval. Siblings have as many tokens as the sentence, position by position, another clean prompt each, and one
answer: the words of a table change with their whole row (France, Paris → Japan, Tokyo), a series is moved as a whole
(Monday, Tuesday → Friday, Saturday), names are renamed throughout, and where nothing says what becomes of the answer,
it is what the model says, if it says that clearly and it is of the answer's kind.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.repeat import Made
from cutaway.models.model import Model
from cutaway.models.tokens import known
from cutaway.tasks.answers import next_tokens, token_rows
from cutaway.tasks.chat import words_of
from cutaway.tasks.continuations import said_after
from cutaway.tasks.kinds import Kinds, cased, kinds_of
from cutaway.tasks.pair import Pair
from cutaway.tasks.spelling import settled
from cutaway.tasks.task import Task, made

_CLEAR = math.log(2)  # logits between the first and the second prediction that make an answer the one answer
_PHRASE = 8  # tokens in which an answer of several words ends


@dataclass(frozen=True)
class _Draft:
    """A pair under way: both prompts, and answer and foil where the renaming says what they become."""

    clean: str
    corrupt: str
    answer: str | None
    foil: str | None
    subject: str | None


def with_siblings(model: Model, task: Task, n: int = 16, seed: int = 0) -> Task:
    """Return a task of the first pair and up to `n` − 1 pairs of the same form.

    The words that the corruption exchanges, and all others of their kind in the sentence, are renamed consistently. If
    answer and foil are among them they are renamed too; otherwise they become what the model itself says next, if the
    pair's are that too, and a sibling whose two prompts do not differ in that, or which the model does not answer as it
    answers the pair, is left out. A sentence whose exchanged words are of no known kind, or whose answer is neither of
    their kind nor what the model says, has no siblings.
    """
    pair, others = task.pairs[0], list[Pair]()
    if n > 1:
        rng = random.Random(f"{seed}|{pair.clean}")
        first = settled(model, (pair,))[0]  # siblings take the form of its answers
        first = replace(first, answer=first.follows(first.answer), foil=first.follows(first.foil), joined=True)
        drafts = _drafts(model, first, kinds_of(model), 2 * n, rng)
        others = _answered(model, first, drafts)[: n - 1] if drafts else []
    options = {**task.options, "siblings": len(others)}
    return made(replace(task, pairs=(pair, *others), options=options), _made(task, n, seed), model)


def _made(task: Task, n: int, seed: int) -> Made | None:
    """Return the recipe of a task with siblings; flags express it for the task of one sentence."""
    how = task.after("")
    if how is None:
        return None
    why = "" if "sentence" in how.flags else f"no flag says with_siblings of task {task.name!r}"
    flags = {**how.flags, "siblings": n, "seed": seed or None}
    return replace(
        how,
        python=f"ca.tasks.with_siblings(model, {how.python}, {n!r}, {seed!r})",
        flags=flags,
        no_flags=how.no_flags or why,
    )


def _drafts(model: Model, pair: Pair, kinds: Kinds, most: int, rng: random.Random) -> list[_Draft]:
    """Renamed pairs of the pair's length, each with another clean prompt."""
    said = [[m[0].lower() for m in words_of(t, model.tokenizer)] for t in (pair.clean, pair.corrupt)]
    changed = {w for a, b in zip_longest(*said, fillvalue="") if a != b for w in (a, b)}
    if not changed or "" in changed or len(said[0]) != len(said[1]):
        return []
    spoken = list(dict.fromkeys([*said[0], *said[1]]))
    drafts: dict[str, _Draft] = {}
    for names in _renamings(pair, changed, spoken, kinds, 4 * most, rng):
        clean, corrupt, answer, foil = (
            _renamed(model, t, names) for t in (pair.clean, pair.corrupt, pair.answer, pair.foil)
        )
        if clean != pair.clean:
            subject = None if pair.subject is None else _renamed(model, pair.subject, names)
            told = [t if w.strip().lower() in names else None for t, w in ((answer, pair.answer), (foil, pair.foil))]
            drafts.setdefault(clean, _Draft(clean, corrupt, told[0], told[1], subject))
    fine = zip(drafts.values(), *(known(model.tokenizer, t) for t in _texts(drafts.values())), strict=True)
    made = [d for d, *whole in fine if all(whole)]
    length = len(token_rows(model, [pair.clean])[0])
    rows = [token_rows(model, t) for t in _texts(made)] if made else [[], []]
    fits = [len(a) == len(b) == length for a, b in zip(*rows, strict=True)]
    return [d for d, fit in zip(made, fits, strict=True) if fit][:most]


def _texts(drafts: Iterable[_Draft]) -> tuple[list[str], list[str]]:
    """Return the clean texts and the corrupt ones."""
    every = list(drafts)
    return [d.clean for d in every], [d.corrupt for d in every]


def _renamings(
    pair: Pair, changed: set[str], spoken: list[str], kinds: Kinds, most: int, rng: random.Random
) -> Iterator[dict[str, str]]:
    """Yield renamings of words: by rows of a table, by moving a series, by other numbers, or within a set."""
    answers = [pair.answer.strip().lower(), pair.foil.strip().lower()]
    for rows in kinds.rows:
        mine = [r for r in rows if changed & {w.lower() for w in r}]
        covered = {w.lower() for r in mine for w in r}
        if changed <= covered and set(answers) <= covered:
            others = [r for r in rows if r not in mine]
            for _ in range(most if len(others) >= len(mine) else 0):
                new = rng.sample(others, len(mine))
                yield {a.lower(): b for r, to in zip(mine, new, strict=True) for a, b in zip(r, to, strict=True)}
            return
    for run in kinds.series:
        low = {w.lower() for w in run.words}
        if changed <= low:
            told = [w for w in dict.fromkeys([*spoken, *answers]) if w in low]
            moves = [{w: run.moved(w, by) for w in told} for by in range(1 - len(low), len(low)) if by]
            rng.shuffle(moves)
            yield from ({w: to for w, to in m.items() if to} for m in moves if all(m.values()))
            return
    family = _family(changed, kinds)
    renamed = [w for w in spoken if w in family]
    fresh = sorted(family.keys() - set(renamed))
    for _ in range(most if renamed and len(fresh) >= len(renamed) else 0):
        yield {w: family[to] for w, to in zip(renamed, rng.sample(fresh, len(renamed)), strict=True)}


def _family(changed: set[str], kinds: Kinds) -> dict[str, str]:
    """Return the smallest set of words of one kind that holds every exchanged word, as lower case → word."""
    digits = {len(w) for w in changed}
    if all(w.isdigit() for w in changed) and len(digits) == 1 and max(digits) <= 4:
        size = digits.pop()
        return {str(n): str(n) for n in range(10 ** (size - 1) if size > 1 else 0, 10**size)}
    return min(kinds.of(*changed), key=len, default={})


def _answered(model: Model, pair: Pair, drafts: list[_Draft]) -> list[Pair]:
    """Drafts with both answers known and of one token each, as pairs that the model tells apart as it does the pair.

    What the model says of a sibling answers the same question only if the pair's own answer is what the model says of
    it; otherwise no sibling is returned. A foil that is not what it says of the corrupt prompt is kept as it is.
    """
    prompts = [pair.clean, pair.corrupt, *(t for d in drafts for t in (d.clean, d.corrupt))]
    logits, kinds = model.run_last(prompts).float(), kinds_of(model)
    tops = logits.topk(2)
    clear = ((tops.values[:, 0] - tops.values[:, 1]) > _CLEAR).tolist()
    texts = model.text.token_texts(tops.indices[:, 0])
    own = next_tokens(model, [pair.clean] * 2, [pair.follows(pair.answer), pair.follows(pair.foil)])
    if any(ids is None or len(ids) > 1 for ids in own):
        return _answered_whole(model, pair, drafts)
    usual, flips = ([int(top)] == ids for top, ids in zip(tops.indices[:2, 0], own, strict=True))
    out, signs = [], _signs(logits[:2], own)
    for n, d in enumerate(drafts):
        at = slice(2 + 2 * n, 4 + 2 * n)
        (says, instead), (sure, _) = texts[at], clear[at]
        if d.answer is None and not (usual and (sure or not clear[0]) and kinds.alike(pair.answer, says)):
            continue
        answer, foil = (t if t is not None else f" {by.strip()}" for t, by in ((d.answer, says), (d.foil, instead)))
        foil = pair.foil if d.foil is None and not flips else foil
        ids = next_tokens(model, [d.clean, d.clean], [answer, foil])
        single = all(i is not None and len(i) == 1 for i in ids) and ids[0] != ids[1]
        if single and answer.strip() != foil.strip() and _signs(logits[at], ids) == signs:
            out.append(Pair(d.clean, d.corrupt, answer, foil, d.subject, pair.group, joined=True))
    return out


def _answered_whole(model: Model, pair: Pair, drafts: list[_Draft]) -> list[Pair]:
    """Return drafts as pairs whose answers may have several tokens: the known ones, or the words with which the model
    goes on if the pair's own answer is that. Answers are ahead of their foils where the pair's is.
    """
    prompts = [pair.clean, pair.corrupt, *(t for d in drafts for t in (d.clean, d.corrupt))]
    texts = [_phrase(t, pair.answer) for t in model.generate(prompts, _PHRASE)]
    usual, flips = (said == given for said, given in zip(texts, (pair.answer, pair.foil), strict=False))
    signs, out = _whole_signs(model, pair), []
    for n, d in enumerate(drafts):
        says, instead = texts[2 + 2 * n : 4 + 2 * n]
        if d.answer is None and not (usual and says and kinds_of(model).alike(pair.answer, says)):
            continue
        answer = d.answer if d.answer is not None else says
        foil = d.foil if d.foil is not None else instead if flips else pair.foil
        ids = next_tokens(model, [d.clean, d.clean], [answer, foil])
        if answer.strip() == foil.strip() or not all(ids) or _begins(ids[0], ids[1]):
            continue
        sibling = Pair(d.clean, d.corrupt, answer, foil, d.subject, pair.group, joined=True)
        if _whole_signs(model, sibling) == signs:
            out.append(sibling)
    return out


def _phrase(text: str, like: str) -> str:
    """Return the words at the beginning of a text: as many capitalised ones as follow each other where an answer is
    capitalised, else one.
    """
    word = r"[^\W\d_][\w'’-]*"
    more = rf"(?: (?=[^\W\d_a-z]){word})*" if like.strip()[:1].isupper() else ""
    found = re.match(rf"\s*{word}{more}", text)
    return found[0] if found else ""


def _begins(a: list[int] | None, b: list[int] | None) -> bool:
    return not a or not b or a[: len(b)] == b[: len(a)]


def _whole_signs(model: Model, pair: Pair) -> tuple[bool, ...]:
    """Return, for the clean and the corrupt prompt, True if the whole answer is likelier than the foil."""
    ids = next_tokens(model, [pair.clean] * 2, [pair.follows(pair.answer), pair.follows(pair.foil)])
    answer, foil = (said_after(model, [pair.clean, pair.corrupt], i) for i in ids if i)
    return tuple((answer > foil).tolist())


def _signs(logits: Float[Tensor, "2 token"], ids: list[list[int] | None]) -> tuple[bool, ...]:
    """Return, for the clean and the corrupt prompt, True if the answer is ahead of the foil."""
    if any(i is None or len(i) != 1 for i in ids):
        return ()
    answer, foil = (torch.tensor(i, device=logits.device) for i in ids)
    return tuple((logits.index_select(1, answer) > logits.index_select(1, foil))[:, 0].tolist())


def _renamed(model: Model, text: str, names: dict[str, str]) -> str:
    for m in reversed(words_of(text, model.tokenizer)):
        if m[0].lower() in names:
            text = text[: m.start()] + cased(names[m[0].lower()], m[0]) + text[m.end() :]
    return text
