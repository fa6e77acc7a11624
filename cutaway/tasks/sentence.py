"""A task from one sentence of the user: the tool proposes the corruption, and says which.

Symmetric token replacement (Zhang & Nanda 2024, arXiv:2309.16042): one content word is replaced by another word of as
many tokens, so that every position keeps its meaning. Where there is a textbook contrast it is taken: the repeated name
becomes the other one, a country another country; the prediction must change to another answer of the kind, and the
answer itself lose odds by a factor of e. Else words that the model expects in the place of another are tried, then
words that only look alike, and the one that moves the target against the foil most is taken. What belongs to a chat
template is never touched.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.repeat import Made, called
from cutaway.core.text import occurrences
from cutaway.models.model import Model
from cutaway.models.spacing import forms
from cutaway.tasks import replacements, world
from cutaway.tasks.answers import token_rows, whole_answers
from cutaway.tasks.chat import words_of
from cutaway.tasks.continuations import said_after
from cutaway.tasks.kinds import FUNCTION_WORDS, Kinds, kinds_of
from cutaway.tasks.pair import Pair
from cutaway.tasks.replacements import Replacement, fitting, usual
from cutaway.tasks.spelling import spelled
from cutaway.tasks.task import Task, made

FALLS = 1.0  # logits that the answer's own log odds must lose in a textbook contrast
_LIKELY = 20  # predictions among which answers and foils are sought
_SAYS = {
    "exchange": "the last mention of the repeated word becomes the other one; ",
    "kind": "another word of its kind, the strongest of {} replacements tried; ",
    "expected": "a word the model expects there, the strongest of {} replacements tried; ",
}


@dataclass(frozen=True)
class Tried:
    """Replacements that were run, the model's logits after each, and the log-probabilities of whole target and foil
    where these have several tokens.
    """

    made: list[Replacement]
    logits: Float[Tensor, "run token"]
    whole: Float[Tensor, "run text"]

    def __add__(self, other: Tried) -> Tried:
        both = torch.cat([self.logits, other.logits]), torch.cat([self.whole, other.whole])
        return Tried(self.made + other.made, *both)


@dataclass(frozen=True)
class Chosen:
    """The replacement taken, the foil, the shift in logits, and whether it is a textbook contrast."""

    made: Replacement
    foil: tuple[str, int]
    shift: float
    textbook: bool


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
    """Return the task of one sentence: why does the model go on with `target` and not with `foil`?

    Args:
        model: a loaded model.
        sentence: the prompt; its next word is the question.
        target: the answer; the model's top prediction if not given.
        foil: the wrong answer; if not given, the best other prediction of the answer's kind under the corrupt prompt.
        subject: the part of the sentence to corrupt; any content word if not given.
        corrupt: the corrupt prompt, if you have one.
        candidates: how many replacements of each sort to try, those of a sort in one batched forward.
        seed: of the choice of candidates.
        metric: name of the metric.
        joined: True if target and foil go on with the sentence's last word, as they are written.

    Raises:
        Refused: no replacement of equal token length, or none that moves the answer; a target or foil that the model
            cannot say next.
    """
    length = len(token_rows(model, [sentence])[0])
    if target is None and re.search(r"\S $", sentence):
        why = "it ends in a space, and words bring their own: what follows is hardly ever text"
        raise Refused(f"the model's prediction after {sentence!r}", why, "take the space off its end")
    given = {r: w for r, w in (("target", target), ("foil", foil)) if w is not None}
    texts = dict(zip(given, spelled(model, sentence, list(given.values()), joined), strict=True))
    rows = {r: whole_answers(model, [sentence], [text], r)[0] for r, text in texts.items()}
    if len({tuple(ids) for ids in rows.values()}) < len(rows):
        raise Refused(f"target {target!r} and foil {foil!r}", "they are the same token", "give another foil")
    asked = {r: (text, rows[r][0]) for r, text in texts.items()}
    clean = model.run_last([sentence]).float()[0]
    answer = asked.get("target") or _top(model, sentence, clean)
    whole = () if all(len(ids) == 1 for ids in rows.values()) else _in_order(answer, rows)
    search = _Search(model, sentence, clean, answer, asked.get("foil"), kinds_of(model), length, whole)
    if corrupt is not None:
        tried = search.run([Replacement(corrupt, "", "", "given")])
        best = search.choose(tried)
    else:
        best, tried = search.best(subject, candidates, random.Random(f"{seed}|{sentence}"))
    pair = Pair(
        sentence, best.made.text, answer[0], best.foil[0], subject or best.made.old or None, "sentence", joined=True
    )
    return _task(model, pair, metric, _says(pair, best, len(tried.made), "log P" if whole else "logit"))


def _in_order(answer: tuple[str, int], rows: dict[str, list[int]]) -> tuple[list[int], ...]:
    """Return the tokens of the answer, and of the foil where one is given."""
    return (rows.get("target", [answer[1]]), *([rows["foil"]] if "foil" in rows else []))


def _task(model: Model, pair: Pair, metric: str, says: str) -> Task:
    sentence, answers = pair.clean, (pair.answer, pair.foil)
    options = {"sentence": sentence, "target": pair.answer, "foil": pair.foil, "corrupt": pair.corrupt}
    known = world.known(model.world, sentence, pair.answer) if getattr(model, "world", None) is not None else None
    as_read = [forms(sentence, w) == (w,) for w in answers]
    told: dict[str, Any] = {
        "target": pair.answer,
        "foil": pair.foil,
        "subject": pair.subject,
        "corrupt": pair.corrupt,
        "metric": metric if metric != "logit_diff" else None,
        "joined": None if all(as_read) else True,
    }
    how = Made(
        called("ca.tasks.from_sentence", "model", repr(sentence), **told),
        {"": "sentence", "sentence": sentence, **told},
    )
    return made(Task("sentence", (pair,), metric, says, known, options), how, model)


def _top(model: Model, sentence: str, logits: Float[Tensor, "token"]) -> tuple[str, int]:
    """Return the strongest prediction that is text: which, put after the sentence, is read as that one token."""
    likely, ends = (
        logits.topk(min(_LIKELY, len(logits))).indices.tolist(),
        getattr(model.tokenizer, "eos_token_id", None),
    )
    said = [i for i in likely[:1] if i == ends]
    found = usual(model, sentence, likely, said)
    if not found:
        why = "its strongest tokens are no text by themselves"
        raise Refused(f"the model's prediction after {sentence!r}", why, "name a target")
    return next((text, i) for i, text in found.items())


@dataclass(frozen=True)
class _Search:
    """The search for a corruption of one sentence.

    Attributes:
        model: the model that is asked.
        sentence: the prompt.
        clean: its last logits.
        answer: the answer and its (first) token.
        foil: the foil and its (first) token; None if it is sought, too.
        kinds: the kinds of words.
        length: the number of tokens of the prompt.
        whole: the tokens of the answer and of a given foil, if any of them has several; else empty.
    """

    model: Model
    sentence: str
    clean: Float[Tensor, "token"]
    answer: tuple[str, int]
    foil: tuple[str, int] | None
    kinds: Kinds
    length: int
    whole: tuple[list[int], ...] = ()

    def best(self, subject: str | None, most: int, rng: random.Random) -> tuple[Chosen, Tried]:
        """Return the textbook contrast, where a sort of replacement has one, else the largest shift of all."""
        spans = self._content(subject)
        sorts = (
            lambda: replacements.of_kind(self.sentence, spans, self.kinds, rng),
            lambda: replacements.expected(self.model, self.sentence, spans, self.kinds),
            lambda: replacements.of_form(self.model, self.sentence, spans, rng),
        )
        tried: Tried | None = None
        for sort in sorts:
            proposed = fitting(self.model, sort(), self.length, most)
            if not proposed:
                continue
            tried = self.run(proposed) if tried is None else tried + self.run(proposed)
            best = self.choose(tried)
            if best.textbook:
                return best, tried
        if tried is None:
            why = "no word of it" + (f" in {subject!r}" if subject else "") + " has a replacement of as many tokens"
            raise Refused(f"a corruption of {self.sentence!r}", why, "give a corrupt prompt of the same length")
        if best.shift <= 0:
            said = self.answer[0].strip()
            why = f"none of {len(tried.made)} replacements makes {said!r} less likely against another answer"
            raise Refused(f"a corruption of {self.sentence!r}", why, "give a corrupt prompt, or another target")
        return best, tried

    def run(self, proposed: list[Replacement]) -> Tried:
        """Return the model's predictions after each."""
        texts = [r.text for r in proposed]
        return Tried(proposed, self.model.run_last(texts).float(), self._said(texts))

    def _said(self, texts: list[str]) -> Float[Tensor, "run text"]:
        """Return the log-probabilities of the whole answer, and of a given foil, after each text; none if no answer has
        several tokens.
        """
        found = [said_after(self.model, texts, ids).float() for ids in self.whole]
        return torch.stack(found, dim=1) if found else torch.empty(len(texts), 0)

    def _moved(self, tried: Tried, foils: list[tuple[str, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return answer minus foil after each replacement, how far it is from the sentence's own, and the log odds that
        the answer loses [run]: in logits, or in log-probabilities of whole answers.
        """
        runs, answer = tried.logits, self.answer[1]
        ids = torch.tensor([i for _, i in foils], device=runs.device)
        if not self.whole:
            after = runs[:, answer] - runs.gather(1, ids[:, None])[:, 0]
            return (
                after,
                self.clean[answer] - self.clean[ids] - after,
                _log_odds(self.clean, answer) - _log_odds(runs, answer),
            )
        own, said = self._said([self.sentence]), tried.whole
        if len(self.whole) > 1:
            foil, before = said[:, 1], own[:, 1]
        else:  # the foil is what the model says next, one token
            foil = runs.log_softmax(-1).gather(1, ids[:, None])[:, 0]
            before = self.clean.log_softmax(-1)[ids]
        after = said[:, 0] - foil
        return after, own[:, 0] - before - after, _odds(own[:, 0]) - _odds(said[:, 0])

    def choose(self, tried: Tried) -> Chosen:
        """Return a textbook contrast before all others, exchanges before these, else the largest shift."""
        foils = self._foils(tried)
        after, shifts, falls = self._moved(tried, foils)
        likes = [self.kinds.alike(self.answer[0], text) for text, _ in foils]
        good = [
            r.sort in ("exchange", "kind", "expected") and like and flips and fall >= FALLS
            for r, like, flips, fall in zip(tried.made, likes, (after < 0).tolist(), falls.tolist(), strict=True)
        ]
        order = ("exchange", "kind", "expected", "form", "given")
        start = self.sentence.lstrip()

        def rank(i: int) -> tuple[bool, int, bool, float]:
            r = tried.made[i]
            name = r.old[:1].isupper() and not start.startswith(r.old)  # what a sentence is about bears a name
            return not good[i], order.index(r.sort) if good[i] else 0, not (good[i] and name), -float(shifts[i])

        best = min(range(len(foils)), key=rank)
        return Chosen(tried.made[best], foils[best], float(shifts[best]), good[best])

    def _foils(self, tried: Tried) -> list[tuple[str, int]]:
        """After each replacement: the word that was exchanged, else the best other answer that is alike, else the best.

        Tokens that read the same as the answer but for a space or case are no foil for a reader.
        """
        if self.foil is not None:
            return [self.foil] * len(tried.made)
        likely = tried.logits.topk(min(_LIKELY, tried.logits.shape[1])).indices
        texts = usual(self.model, self.sentence, likely.unique().tolist())
        said = self.answer[0].strip().lower()
        others = {i: t for i, t in texts.items() if i != self.answer[1] and t.strip().lower() != said}
        alike = {i for i, t in others.items() if self.kinds.alike(self.answer[0], t)}
        out: list[tuple[str, int]] = []
        for r, row in zip(tried.made, likely.tolist(), strict=True):
            words = {others[i].strip().lower(): i for i in reversed(row) if i in others}
            own = words.get(r.old.lower()) if r.sort == "exchange" and r.new.lower() == said else None
            first = next((i for i in row if i in alike), next((i for i in row if i in others), None))
            if own is None and first is None:
                why = "its strongest tokens are no text by themselves"
                raise Refused(f"the model's prediction after {r.text!r}", why, "name a foil")
            chosen = own if own is not None else first
            assert chosen is not None
            out.append((others[chosen], chosen))
        return out

    def _content(self, subject: str | None) -> list[re.Match[str]]:
        """Return the words that may be replaced: those of the subject, or all content words, or all words."""
        found = words_of(self.sentence, self.model.tokenizer)
        if subject is not None:
            places = occurrences(self.sentence, subject) if subject.strip() else []
            if not places:
                what, why = f"subject {subject!r}", f"it is not in the sentence {self.sentence!r}"
                raise Refused(what, why, "quote a part of it")
            whole = [p for p in places if not any(m.start() < at < m.end() for m in found for at in p)]
            return [m for m in found if any(m.start() < end and m.end() > start for start, end in whole or places)]
        return [m for m in found if m[0].lower() not in FUNCTION_WORDS] or found


def _log_odds(logits: Float[Tensor, "*run token"], token: int) -> Float[Tensor, "*run"]:
    """Log odds of one token against all others."""
    rest = logits.index_fill(-1, torch.tensor([token], device=logits.device), float("-inf"))
    return logits[..., token] - rest.logsumexp(-1)


def _odds(log_prob: Float[Tensor, "run"]) -> Float[Tensor, "run"]:
    """Log odds of something of this log-probability."""
    return log_prob - torch.log1p(-log_prob.exp().clamp_max(1 - 1e-6))


def _says(pair: Pair, best: Chosen, tried: int, of: str) -> str:
    pairs = [(best.made.old, best.made.new)] if best.made.old else dict.fromkeys(pair.changes())
    changes = ", ".join(f"“{a}” → “{b}”" for a, b in pairs)
    answer, foil = (w.strip() or repr(w) for w in (pair.answer, pair.foil))
    moved = f"it moves {of}({answer}) − {of}({foil}) by {-best.shift:+.2f}".replace(" by -", " by −")
    if best.made.sort == "given":
        return f"{changes} (given; {moved})"
    why = _SAYS[best.made.sort].format(tried) if best.textbook else f"the largest shift of {tried} replacements tried; "
    return f"{changes} ({why}{moved})"
