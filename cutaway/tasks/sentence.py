"""A task from one sentence of the user: the tool proposes the corruption, and says which.

Symmetric token replacement (Zhang & Nanda 2024, arXiv:2309.16042): one content word is replaced by another word of as
many tokens, so that every position keeps its meaning. Replacements of every content word are tried in one batched
forward, and the one that moves the target against the foil most is taken. Words of the same kind (names for names,
days for days) go before words that only look alike.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.again import Made, called
from cutaway.core.refuse import Refused
from cutaway.core.text import occurrences
from cutaway.models.model import Model
from cutaway.models.spacing import forms
from cutaway.tasks import words, world
from cutaway.tasks.answers import next_tokens, single_tokens, token_rows
from cutaway.tasks.pair import Pair
from cutaway.tasks.spelling import spelled
from cutaway.tasks.task import Task, made

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SPACE_MARKS = "Ġ▁ "  # how byte-level and sentencepiece tokenizers write a leading space
_FUNCTION_WORDS = (
    "a an the and or but of in on at to from by with for as is are was were be been being am it its this that these "
    "those he she they we you i his her their our your my me him them us who what which when where while after before "
    "then so if not no do does did has have had will would can could may should there here"
)


@dataclass(frozen=True)
class Replacement:
    """One proposed corruption: the changed sentence, the word before and after, and whether they are of one kind."""

    text: str
    old: str
    new: str
    same_kind: bool


def from_sentence(
    model: Model,
    sentence: str,
    target: str | None = None,
    foil: str | None = None,
    subject: str | None = None,
    *,
    corrupt: str | None = None,
    candidates: int = 48,
    seed: int = 0,
    metric: str = "logit_diff",
    joined: bool = False,
) -> Task:
    """The task of one sentence: why does the model go on with `target` and not with `foil`?

    Args:
        model: a loaded model.
        sentence: the prompt; its next word is the question.
        target: the answer; the model's top prediction if not given.
        foil: the wrong answer; if not given, the best other prediction under the corrupt prompt.
        subject: the part of the sentence to corrupt; any content word if not given.
        corrupt: the corrupt prompt, if you have one.
        candidates: how many replacements to try, all in one batched forward.
        seed: of the choice of candidates.
        metric: name of the metric.
        joined: True if target and foil go on with the sentence's last word, as they are written.

    Raises:
        Refused: no replacement of equal token length, or none that moves the answer; an answer of several tokens.
    """
    length = len(token_rows(model, [sentence])[0])
    if target is None and re.search(r"\S $", sentence):
        why = "it ends in a space, and words bring their own: what follows is hardly ever text"
        raise Refused(f"the model's prediction after {sentence!r}", why, "take the space off its end")
    given = {r: w for r, w in (("target", target), ("foil", foil)) if w is not None}
    texts = dict(zip(given, spelled(model, sentence, list(given.values()), joined), strict=True))
    asked = {r: (text, single_tokens(model, [sentence], [text], r)[0]) for r, text in texts.items()}
    if len({i for _, i in asked.values()}) < len(asked):
        raise Refused(f"target {target!r} and foil {foil!r}", "they are the same token", "give another foil")
    if corrupt is not None:
        tried = [Replacement(corrupt, "", "", True)]
    else:
        tried = _propose(model, sentence, subject, length, candidates, random.Random(f"{seed}|{sentence}"))
    logits = model.run_last([sentence, *(r.text for r in tried)]).float()
    answer = asked.get("target") or _top(model, sentence, logits[0], set())
    best, other, shift = _choose(model, sentence, logits, tried, answer, asked.get("foil"))
    if corrupt is None and shift <= 0:
        why = f"none of {len(tried)} replacements makes {answer[0].strip()!r} less likely against another answer"
        raise Refused(f"a corruption of {sentence!r}", why, "give a corrupt prompt, or another target")
    about = subject or best.old or None
    pair = Pair(sentence, best.text, answer[0], other[0], about, "sentence", joined=True)
    says = _says(pair, shift, len(tried), given=corrupt is not None)
    options = {"sentence": sentence, "target": pair.answer, "foil": pair.foil, "corrupt": best.text}
    known = world.known(model.world, sentence, answer[0]) if getattr(model, "world", None) is not None else None
    as_read = [forms(sentence, w) == (w,) for w in (pair.answer, pair.foil)]
    told: dict[str, Any] = {"target": pair.answer, "foil": pair.foil, "subject": about, "corrupt": best.text,
                            "metric": metric if metric != "logit_diff" else None,
                            "joined": None if all(as_read) else True}  # fmt: skip
    how = Made(called("ca.tasks.from_sentence", "model", repr(sentence), **told),
               {"": "sentence", "sentence": sentence, **told})  # fmt: skip
    return made(Task("sentence", (pair,), metric, says, known, options), how, model)


def _top(model: Model, sentence: str, logits: Float[Tensor, "token"], excluded: set[int]) -> tuple[str, int]:
    """The strongest prediction that is text: which, put after the sentence, is read as that one token."""
    begins, ends = (getattr(model.tokenizer, f"{n}_token_id", None) for n in ("bos", "eos"))
    excluded = excluded | ({begins} if begins != ends else set())  # a beginning of text in its middle is no word
    ids = [i for i in logits.topk(min(20, len(logits))).indices.tolist() if i not in excluded]
    texts = model.token_texts(ids)
    forms = [(i, form) for i, t in zip(ids, texts, strict=True) for form in dict.fromkeys((f" {t.lstrip()}", t)) if t]
    found = next_tokens(model, [sentence] * len(forms), [form for _, form in forms])
    for (i, form), row in zip(forms, found, strict=True):
        if row == [i]:
            return form, i
    why = "its strongest tokens are no text by themselves"
    raise Refused(f"the model's prediction after {sentence!r}", why, "name a target")


def _choose(
    model: Model,
    sentence: str,
    logits: Float[Tensor, "run token"],
    tried: list[Replacement],
    said: tuple[str, int],
    foil: tuple[str, int] | None,
) -> tuple[Replacement, tuple[str, int], float]:
    """The replacement that moves the answer against the foil most, with that foil and the shift in logits.

    Replacements by the same kind of word that really change the prediction go before all others.
    """
    clean, runs, answer = logits[0], logits[1:], said[1]
    same = _same_word(model, runs, said)
    others = runs.index_fill(1, torch.tensor(sorted(same), device=runs.device), float("-inf"))
    foils = others.argmax(-1) if foil is None else torch.full((len(runs),), foil[1], device=runs.device)
    after = runs[:, answer] - runs.gather(1, foils[:, None])[:, 0]
    shifts = (clean[answer] - clean[foils] - after).tolist()
    best = min(range(len(tried)), key=lambda i: (not (tried[i].same_kind and after[i] < 0), -shifts[i]))
    if foil is None:
        foil = _top(model, sentence, runs[best], same)
    shift = (clean[answer] - clean[foil[1]]) - (runs[best, answer] - runs[best, foil[1]])
    return tried[best], foil, float(shift)


def _same_word(model: Model, runs: Float[Tensor, "run token"], said: tuple[str, int]) -> set[int]:
    """The answer's token, and likely tokens that read the same but for a space: no foil for a reader."""
    likely = runs.topk(min(20, runs.shape[1])).indices.unique().tolist()
    texts = model.token_texts(likely)
    return {said[1]} | {i for i, t in zip(likely, texts, strict=True) if t.strip() == said[0].strip()}


def _propose(
    model: Model, sentence: str, subject: str | None, length: int, most: int, rng: random.Random
) -> list[Replacement]:
    """Replacements of equal token length, dealt fairly over the words, those of the same kind first."""
    spans = _content(sentence, subject)
    families = [*words.kinds(), *(world.kinds(model.world) if getattr(model, "world", None) is not None else [])]
    per_word = []
    for word in dict.fromkeys(m[0] for m in spans):
        places = [m.span() for m in spans if m[0] == word]
        made = list(dict.fromkeys(_of_word(model, sentence, word, places, spans, families, rng)))
        rows = token_rows(model, [r.text for r in made]) if made else []
        per_word.append([r for r, row in zip(made, rows, strict=True) if len(row) == length])
    dealt = [r for turn in world.zip_turns(per_word) for r in turn]
    chosen = list(dict.fromkeys(dealt))[:most]
    if not chosen:
        raise Refused(
            f"a corruption of {sentence!r}",
            "no word of it" + (f" in {subject!r}" if subject else "") + " has a replacement of as many tokens",
            "give a corrupt prompt of the same length",
        )
    return chosen


def _content(sentence: str, subject: str | None) -> list[re.Match[str]]:
    """The words that may be replaced: those of the subject, or all content words, or all words."""
    found = list(_WORD.finditer(sentence))
    if subject is not None:
        places = occurrences(sentence, subject) if subject.strip() else []
        if not places:
            raise Refused(f"subject {subject!r}", f"it is not in the sentence {sentence!r}", "quote a part of it")
        whole = [p for p in places if not _inside(found, p)]
        return [m for m in found if any(m.start() < end and m.end() > start for start, end in whole or places)]
    return [m for m in found if m[0].lower() not in _FUNCTION_WORDS.split()] or found


def _inside(givenof: list[re.Match[str]], place: tuple[int, int]) -> bool:
    """Whether a place begins or ends within a word."""
    return any(m.start() < at < m.end() for m in givenof for at in place)


def _of_word(
    model: Model,
    sentence: str,
    word: str,
    places: list[tuple[int, int]],
    spans: list[re.Match[str]],
    families: list[frozenset[str]],
    rng: random.Random,
) -> Iterable[Replacement]:
    """Replacements of one word: by a word of its kind in the sentence, of its kind at large, and of its form."""
    mine = [{w.lower(): w for w in f} for f in families]
    mine = [f for f in mine if word.lower() in f]
    # A single mention becomes another word of the sentence: in "Mary and John …, John gave it to", John → Mary.
    inside = [m[0] for m in spans if m[0] != word and any(m[0].lower() in f for f in mine)]
    for new in dict.fromkeys(inside):
        for place in places:
            yield Replacement(_replaced(sentence, [place], new), word, new, True)
    present = {m[0].lower() for m in spans}
    siblings = sorted({w for f in mine for k, w in f.items() if k not in present})
    for new in (_cased(w, word) for w in rng.sample(siblings, min(24, len(siblings)))):
        yield Replacement(_replaced(sentence, places, new), word, new, True)
    for new in _alike(model, sentence, word, places[0], rng):
        if new.lower() not in present:
            yield Replacement(_replaced(sentence, places, new), word, new, False)


def _alike(model: Model, sentence: str, word: str, place: tuple[int, int], rng: random.Random) -> list[str]:
    """Words of the same form: numbers of as many digits; else tokens of the vocabulary near the word's own."""
    if word.isdigit():
        kept = word[: len(word) - 2]  # a year stays in its century
        low = 10 if len(word) == 2 else 0
        size = len(word) - len(kept)
        return [f"{kept}{rng.randrange(low, 10**size):0{size}d}" for _ in range(8)]
    tokens = model.tokens([sentence])
    covering = [n for n, o in enumerate(tokens.offsets[0]) if o is not None and o[0] < place[1] and o[1] > place[0]]
    if not covering:
        return []
    first = int(tokens.ids[0][tokens.mask[0]][covering[0]])
    own = str(model.tokenizer.convert_ids_to_tokens(first))
    body = own.lstrip(_SPACE_MARKS)
    if not word.startswith(body):
        return []
    rest = word[len(body) :]
    size = len(model.tokenizer)
    # Byte-pair ids go roughly by frequency, so neighbours in the vocabulary are about as common.
    near = range(max(0, first - size // 8 - 64), min(size, first + size // 8 + 64))
    ids = rng.sample(near, min(400, len(near)))
    pieces = [str(p) for p in model.tokenizer.convert_ids_to_tokens(ids) if p]
    same = [p for p in pieces if p != own and _form(p) == _form(own)]
    return [p.lstrip(_SPACE_MARKS) + rest for p in same[:16]]


def _form(piece: str) -> tuple[bool, bool, bool, bool]:
    """What a token looks like: leading space, letters only, capitalised, long."""
    body = piece.lstrip(_SPACE_MARKS)
    return piece != body, body.isalpha() and body.isascii(), body[:1].isupper(), len(body) > 2


def _cased(new: str, like: str) -> str:
    """`new` in the case of `like`."""
    if like.isupper() and len(like) > 1:
        return new.upper()
    return new[0].upper() + new[1:] if like[0].isupper() else new.lower()


def _replaced(sentence: str, places: Iterable[tuple[int, int]], new: str) -> str:
    for start, end in sorted(places, reverse=True):
        sentence = sentence[:start] + new + sentence[end:]
    return sentence


def _says(pair: Pair, shift: float, tried: int, given: bool) -> str:
    changes = ", ".join(f"“{a}” → “{b}”" for a, b in dict.fromkeys(pair.changes()))
    moved = f"it moves logit({pair.answer.strip()}) − logit({pair.foil.strip()}) by {-shift:+.2f}"
    return (
        f"{changes} (given; {moved})" if given else f"{changes} (the strongest of {tried} replacements tried; {moved})"
    )
