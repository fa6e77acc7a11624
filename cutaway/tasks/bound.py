"""A task bound to a model: token batches of equal length per pair, answer ids, and the metric as a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.models.access.reading import Measure, Seen, jointly
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.models.turns import turns
from cutaway.tasks.answers import check_predicts, next_tokens, single_tokens, token_rows, whole_answers
from cutaway.tasks.continuations import of_several_tokens, stand_behind
from cutaway.tasks.pair import Pair
from cutaway.tasks.readouts import Readout, readout
from cutaway.tasks.spelling import settled

SPANS = ("changed", "subject", "last")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Bound:
    """A task as tokens of one model: clean and corrupt prompts line up position by position in every row.

    Attributes:
        pairs: the pairs, with answers spelled as the model has them.
        clean: the clean prompts; of a metric of whole answers, with the answer behind each. Where answers are of
            several tokens, answer and foil are continuations of each (`clean.tails`).
        corrupt: the corrupt prompts, likewise.
        answers: the first token of each answer.
        foils: the first token of each foil.
        readout: the metric.
        answer_sets: all right tokens, where a task counts several as right; filled up with −1.
        foil_sets: all wrong tokens, likewise.
        reference: last logits of the clean run, for a metric that compares with them.
        steps: the tokens of whole answers, which end the prompts; filled up with −1.
    """

    pairs: tuple[Pair, ...]
    clean: Tokens
    corrupt: Tokens
    answers: Int[Tensor, "batch"]
    foils: Int[Tensor, "batch"]
    readout: Readout
    answer_sets: Int[Tensor, "batch choice"] | None = None
    foil_sets: Int[Tensor, "batch wrong"] | None = None
    reference: Float[Tensor, "batch token"] | None = None
    steps: Int[Tensor, "batch step"] | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def unit(self) -> str:
        """Unit of the metric's values."""
        return self.readout.unit

    @property
    def metric(self) -> Callable[[Tensor], Tensor]:
        """The metric as a function of the logits at the last real token [batch token], which returns values [batch].

        Raises:
            Refused: it reads something else; `measure` takes any metric.
        """
        if not self.readout.last_logits:
            why = f"it reads {self.readout.reads}, not the last logits"
            raise Refused(f"metric {self.readout.name!r} of logits", why, "measure prompts, not their logits")
        return partial(self.readout, answers=self._ids("answer"), foils=self._ids("foil"), reference=self.reference)

    @property
    def measure(self) -> Measure:
        """The metric as runs, sweeps and gradients take it: `model.measure(bound.clean, bound.measure)`."""
        return Measure(self._measured, self.readout.reading, self._columns() if self.readout.of_choices else None)

    def _measured(self, seen: Seen, prompt: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        """Measure rows that are runs of the prompts with these numbers, in any order."""
        read = seen.continuations if self.readout.continuations else seen.activations
        read = seen.last_logits if self.readout.last_logits else read
        assert read is not None
        device = read.device if isinstance(read, Tensor) else prompt.device
        given = {"answers": self._ids("answer"), "foils": self._ids("foil"), "reference": self.reference}
        picked = {n: None if t is None else t.to(device)[prompt.to(device)] for n, t in given.items()}
        if seen.columns is not None:
            picked |= {n: seen.columns_of(t) for n in ("answers", "foils") if (t := picked[n]) is not None}
        return self.readout(read, **picked)  # type: ignore[arg-type]

    def measure_with(self, name: str, model: Model) -> Measure:
        """Return the metric and the one called `name`, as two columns of the same run."""
        return jointly([self.measure, self.measured_by(name, model).measure])

    def measured_by(self, name: str | Readout, model: Model) -> Bound:
        """Return the same prompts under another metric.

        Raises:
            Refused: no metric has that name, one of the two is of whole answers, with which prompts are others, or
                this one is of one next token and answers are of several.
        """
        row = of_several_tokens(readout(name)) if self.clean.tails else readout(name)
        if row.whole_answer != self.readout.whole_answer:
            whole, other = (row, self.readout) if row.whole_answer else (self.readout, row)
            raise Refused(
                f"metric {other.name!r} beside {whole.name!r}",
                f"{whole.name} runs the prompts with their answers behind them, so their last logits follow the answer",
                "measure the two in tasks of their own",
            )
        needed = row.needs_reference and self.reference is None
        return replace(self, readout=row, reference=model.run_last(self.clean) if needed else self.reference)

    @property
    def changed(self) -> Bool[Tensor, "batch position"]:
        """True where the corrupt prompt has another token than the clean one."""
        return (self.clean.ids != self.corrupt.ids) & self.clean.mask

    def span(self, name: str) -> Bool[Tensor, "batch position"]:
        """Return the positions called `changed`, `subject` or `last`; a prompt without a subject has none. In chats
        also those of the words of a role: `system`, `user` or `assistant`.

        Raises:
            Refused: no span has that name.
        """
        if name == "changed":
            return self.changed
        where = torch.zeros_like(self.clean.mask)
        if name == "last":
            last = self.clean.last if self.steps is None else self.clean.last - (self.steps >= 0).sum(1)
            return where.scatter(1, last[:, None], True)
        if name in ROLES:
            for i, text in enumerate(self.clean.texts):
                where[i, self._words_columns(i, turns(text).get(name, []))] = True
            return where
        if name != "subject":
            raise Refused(
                f"span {name!r}", "no span of a prompt has that name", f"use one of {', '.join((*SPANS, *ROLES))}"
            )
        for i, pair in enumerate(self.pairs):
            if pair.subject:
                where[i, self._subject_columns(i, pair.subject)] = True
        return where

    def rows(self, chosen: Sequence[int]) -> Bound:
        """Return some of the pairs, in the padding of the whole."""
        pick = torch.tensor(list(chosen), device=self.answers.device)
        tensors = ("answers", "foils", "answer_sets", "foil_sets", "reference", "steps")
        kept = {n: None if (t := getattr(self, n)) is None else t[pick] for n in tensors}
        return replace(
            self,
            pairs=tuple(self.pairs[i] for i in chosen),
            clean=self.clean.rows(chosen),
            corrupt=self.corrupt.rows(chosen),
            **kept,
        )

    def buckets(self) -> list[Bound]:
        """Return the pairs by token length, shortest first, each bucket without padding."""
        parts = [self.rows(chosen) for chosen in self.clean.by_length().values()]
        return [replace(p, clean=_unpadded(p.clean), corrupt=_unpadded(p.corrupt)) for p in parts]

    def _ids(self, role: str) -> Tensor:
        if role == "answer" and self.steps is not None:
            return self.steps
        sets = getattr(self, f"{role}_sets")
        return getattr(self, f"{role}s") if sets is None else sets

    def _columns(self) -> Int[Tensor, "token"]:
        """Return the answers and foils of all prompts, ascending and once each."""
        ids = torch.cat([self._ids("answer").flatten(), self._ids("foil").flatten()]).unique()
        return ids[ids >= 0]

    def _words_columns(self, i: int, places: Sequence[tuple[int, int]]) -> list[int]:
        """Return the columns of the tokens in some places of a clean prompt."""
        shift, spans = int(self.clean.column(0)[i]), enumerate(self.clean.offsets[i])
        return [n + shift for n, o in spans if o is not None and any(a < o[1] and o[0] < z for a, z in places)]

    def _subject_columns(self, i: int, subject: str) -> list[int]:
        """Return the columns of the subject: of its occurrence that the corruption changed, if it changed one, else the
        first.
        """
        shift, pieces = int(self.clean.column(0)[i]), self.clean.pieces[i]
        places = self.clean.occurrences(i, subject)
        columns = [[n + shift for n in place if pieces[n].strip()] for place in places]
        touched = [c for c in columns if bool(self.changed[i, c].any())]
        return (touched or columns)[0]


def bind(pairs: Sequence[Pair], row: Readout, model: Model) -> Bound:
    """Return pairs as tokens of one model, measured by one metric.

    Raises:
        Refused: a pair of unequal token length, an answer equal to its foil, or one of several tokens under a metric
            of one next token alone.
    """
    check_predicts(model)
    pairs = settled(model, pairs)
    clean, corrupt = model.tokens([p.clean for p in pairs]), model.tokens([p.corrupt for p in pairs])
    for i, pair in enumerate(pairs):
        if clean.lengths[i] != corrupt.lengths[i]:
            raise _unequal(pair, clean.pieces[i], corrupt.pieces[i])
    prompts = [p.clean for p in pairs]
    if row.whole_answer:
        return _with_answers(pairs, row, model)
    texts = {role: [p.follows(getattr(p, role)) for p in pairs] for role in ("answer", "foil")}
    rows = {role: next_tokens(model, prompts, each) for role, each in texts.items()}
    if any(ids and len(ids) > 1 for each in rows.values() for ids in each):
        return _with_continuations(pairs, (clean, corrupt), row, model)
    answers, foils = (single_tokens(model, prompts, texts[role], role) for role in ("answer", "foil"))
    for pair, answer, foil in zip(pairs, answers, foils, strict=True):
        if answer == foil:
            what = f"answer {pair.answer!r} and foil {pair.foil!r} of the prompt {pair.clean!r}"
            raise Refused(what, "both are the same token of this model", "give a foil of another token")
    device = clean.ids.device
    return Bound(
        pairs,
        clean,
        corrupt,
        torch.tensor(answers, device=device),
        torch.tensor(foils, device=device),
        row,
        _sets(model, pairs, "answers", answers, device),
        _sets(model, pairs, "foils", foils, device),
        model.run_last(clean) if row.needs_reference else None,
    )


def _with_continuations(pairs: tuple[Pair, ...], sides: tuple[Tokens, Tokens], row: Readout, model: Model) -> Bound:
    """Return pairs with answers of several tokens: answer and foil as continuations of every prompt."""
    row, found = of_several_tokens(row), list[list[list[int]]]()
    for role in ("answer", "foil"):
        texts = [p.follows(getattr(p, role)) for p in pairs]
        steps = whole_answers(model, [p.clean for p in pairs], texts, role)
        after = whole_answers(model, [p.corrupt for p in pairs], texts, role)
        _check_same(pairs, role, steps, after)
        found.append(steps)
    clean, corrupt = stand_behind(model, pairs, sides, (found[0], found[1]))
    answers, foils = (torch.tensor([ids[0] for ids in rows], device=clean.ids.device) for rows in found)
    reference = model.run_last(clean) if row.needs_reference else None
    return Bound(pairs, clean, corrupt, answers, foils, row, reference=reference)


def _check_same(pairs: Sequence[Pair], role: str, steps: list[list[int]], after: list[list[int]]) -> None:
    """Refuse an answer or foil that is other tokens behind the corrupt prompt than behind the clean one."""
    for pair, right, other in zip(pairs, steps, after, strict=True):
        if right != other:
            what = f"{role} {getattr(pair, role)!r} behind {pair.clean!r} and {pair.corrupt!r}"
            raise Refused(what, "it is not the same tokens in both", "end both prompts at the end of a word")


def _with_answers(pairs: tuple[Pair, ...], row: Readout, model: Model) -> Bound:
    """Return pairs whose prompts run with their answer behind them."""
    texts = [p.follows(p.answer) for p in pairs]
    steps = whole_answers(model, [p.clean for p in pairs], texts)
    after = whole_answers(model, [p.corrupt for p in pairs], texts)
    _check_same(pairs, "answer", steps, after)
    foils = whole_answers(model, [p.clean for p in pairs], [p.follows(p.foil) for p in pairs], "foil")
    clean, corrupt = (
        model.tokens([p + t for p, t in zip(side, texts, strict=True)])
        for side in ([p.clean for p in pairs], [p.corrupt for p in pairs])
    )
    device, longest = clean.ids.device, max(map(len, steps))
    filled = torch.tensor([[*s, *[-1] * (longest - len(s))] for s in steps], device=device)
    return Bound(
        pairs, clean, corrupt, filled[:, 0], torch.tensor([f[0] for f in foils], device=device), row, steps=filled
    )


def askable(model: Model, pairs: Sequence[Pair]) -> set[Pair]:
    """Return the pairs of equal token length whose answer and foil are single tokens, different from each other."""
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


def narrowed(pairs: Iterable[Pair], model: Model, strict: bool = True) -> list[Pair]:
    """Return the pairs whose answer and foil are one token each; see `Task.narrow`. Without `strict`, others stay as
    they are.
    """
    pairs = list(pairs)
    prompts, asked = [p.clean for p in pairs] * 2, settled(model, pairs)
    texts = [*(p.follows(p.answer) for p in asked), *(p.follows(p.foil) for p in asked)]
    rows = next_tokens(model, prompts, texts)
    n, out = len(pairs), []
    for i, pair in enumerate(pairs):
        answer, foil = rows[i], rows[n + i]
        if answer is not None and foil is not None and (len(answer) > 1 or len(foil) > 1):
            with nullcontext() if strict else suppress(Refused):
                pair = _narrow(model, pair, (texts[i], texts[n + i]), (answer, foil))
        out.append(pair)
    return out


def _narrow(model: Model, pair: Pair, texts: tuple[str, str], ids: tuple[list[int], list[int]]) -> Pair:
    shared = len(list(takewhile(lambda ab: ab[0] == ab[1], zip(*ids, strict=False))))
    what = f"answer {pair.answer!r} and foil {pair.foil!r} of the prompt {pair.clean!r}"
    if shared == min(map(len, ids)):
        raise Refused(what, "one is a beginning of the other, so no token tells them apart", "give another foil")
    cuts, at = [], len(pair.clean)
    for text, row in zip(texts, ids, strict=True):
        places = model.tokens([pair.clean + text]).offsets[0][-len(row) :]
        ends = [at, *(o[1] for o in places if o is not None)]
        if len(ends) <= len(row):
            raise Refused(what, "the tokenizer does not say where its tokens lie in the text", "use a fast tokenizer")
        before, after = ends[shared] - at, ends[shared + 1] - at
        if before == after:
            raise Refused(what, "they part inside a letter, where no text can end", "give answers that differ earlier")
        cuts.append((text[:before], text[before:after]))
    (given, answer), (_, foil) = cuts
    return replace(pair, clean=pair.clean + given, corrupt=pair.corrupt + given, answer=answer, foil=foil, joined=True)


def _sets(
    model: Model, pairs: Sequence[Pair], role: str, always: list[int], device: torch.device
) -> Int[Tensor, "batch choice"] | None:
    """Return the token ids of each pair's right (or wrong) continuations, −1 where there are no more; None if no pair
    has sets.

    Continuations of several tokens are left out: the model cannot say them next.
    """
    if not any(getattr(p, role) for p in pairs):
        return None
    wanted = [[(_tail(p.clean), p.follows(a)) for a in getattr(p, role)] for p in pairs]
    distinct = list(dict.fromkeys(w for row in wanted for w in row))
    ids = dict(zip(distinct, next_tokens(model, [t for t, _ in distinct], [a for _, a in distinct]), strict=True))
    rows = [
        list(dict.fromkeys([first, *(i[0] for w in row if (i := ids[w]) is not None and len(i) == 1)]))
        for first, row in zip(always, wanted, strict=True)
    ]
    width = max(map(len, rows))
    return torch.tensor([r + [-1] * (width - len(r)) for r in rows], device=device)


def _tail(prompt: str) -> str:
    """Return the prompt's last two words, which decide how a continuation is cut (and repeat between prompts)."""
    return " ".join(prompt.split(" ")[-2:])


def _unpadded(tokens: Tokens) -> Tokens:
    keep = tokens.mask.any(0)
    return replace(tokens, ids=tokens.ids[:, keep], mask=tokens.mask[:, keep])


def _unequal(pair: Pair, clean: Sequence[str], corrupt: Sequence[str]) -> Refused:
    at = next(
        (i for i, (a, b) in enumerate(zip(clean, corrupt, strict=False)) if a != b), min(len(clean), len(corrupt))
    )
    return Refused(
        f"pair {pair.clean!r} / {pair.corrupt!r}",
        f"the clean prompt has {len(clean)} tokens and the corrupt one {len(corrupt)}; they part at "
        f"{''.join(clean[at : at + 3])!r} / {''.join(corrupt[at : at + 3])!r}",
        "replace words by words of the same number of tokens",
    )
