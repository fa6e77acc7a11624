"""Prompts that show a task by examples: with their labels, with labels exchanged, and without examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from random import Random

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Keyword, Refused
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.answers import continuation, whole_answers
from cutaway.tasks.concepts import Concepts

CONDITIONS = ["shown", "labels shuffled", "zero-shot"]
_WORD = "{}"  # stands for the word in the form of a question
_CHOSE = 0.6  # share of a task's words that choose heads


@dataclass(frozen=True)
class Shots:
    """Prompts of several tasks as tokens of one model.

    Attributes:
        names: the tasks.
        task: the task of each prompt.
        word: the word that it asks about, as a number within its task.
        shown: the prompts with examples.
        shuffled: the same with the examples' labels exchanged.
        bare: the words without examples.
        answer: the first token of the right answer.
        foil: the first token of another answer of the task.
    """

    names: tuple[str, ...]
    task: Int[Tensor, "prompt"]
    word: Int[Tensor, "prompt"]
    shown: Tokens
    shuffled: Tokens
    bare: Tokens
    answer: Int[Tensor, "prompt"]
    foil: Int[Tensor, "prompt"]

    @property
    def conditions(self) -> tuple[Tokens, Tokens, Tokens]:
        """Tokens of each of `CONDITIONS`."""
        return self.shown, self.shuffled, self.bare

    def by_task(self, x: Float[Tensor, "prompt *rest"]) -> list[Float[Tensor, "own *rest"]]:
        """Return the values of each task's prompts."""
        return [x[self.task == t] for t in range(len(self.names))]

    def others(self) -> Float[Tensor, "prompt other"]:
        """Return weights whose product with values is the mean over the task's prompts about other words."""
        weight = (self.task[:, None] == self.task) & (self.word[:, None] != self.word)
        return weight / weight.sum(1, keepdim=True)

    def of_tasks(self) -> Float[Tensor, "task prompt"]:
        """Return weights whose product with values is the mean over each task's prompts."""
        weight = torch.arange(len(self.names))[:, None] == self.task
        return weight / weight.sum(1, keepdim=True)


@dataclass(frozen=True)
class _Task:
    """A task: its words, what it makes of them, the first token of that, and how many words choose heads."""

    name: str
    words: tuple[str, ...]
    labels: tuple[str, ...]
    ids: tuple[int, ...]
    chose: int


@dataclass(frozen=True)
class _Query:
    """A word that is asked about behind others, all by their numbers in a task; `labels` are the others' exchanged."""

    task: int
    word: int
    others: tuple[int, ...]
    labels: tuple[int, ...]
    foil: int


def show(
    model: Model, concepts: Concepts, n: int, k: int, form: str, between: str
) -> tuple[Shots, Shots, dict[str, int]]:
    """Return `n` prompts of each task that choose heads, one about every word left over, and the tasks that are left
    out with their number of words.

    Examples are words that choose, and never the one that is asked about.

    Raises:
        Refused: a form without a word, no task of enough words, or an answer that cannot stand behind its prompt.
    """
    if form.count(_WORD) != 1:
        raise Refused(Keyword("form", form), f"{_WORD} stands for the word, once", 'write for example "{} ->"')
    tasks, short = list[_Task](), dict[str, int]()
    for name, pairs in zip(concepts.names, concepts.pairs, strict=True):
        rows = list(dict(pairs).items())
        Random(0).shuffle(rows)
        chose = ceil(_CHOSE * len(rows))
        asked = [form.replace(_WORD, word) for word, _ in rows]
        ends = [continuation(text, label) for text, (_, label) in zip(asked, rows, strict=True)]
        ids = [row[0] for row in whole_answers(model, asked, ends)]
        if chose < max(k + 1, 3) or chose == len(rows) or len(set(ids)) < 2:
            short[name] = len(rows)
        else:
            words, labels = zip(*rows, strict=True)
            tasks.append(_Task(name, words, labels, tuple(ids), chose))
    if not tasks:
        counts = ", ".join(f"{name} {m}" for name, m in short.items())
        why = f"{_CHOSE:.0%} of a task's words give the examples and one to ask about: {counts}"
        raise Refused(f"tasks with {k} examples", why, "ask for fewer examples, or give more words")
    first = [q for t, task in enumerate(tasks) for q in _queries(t, task, [i % task.chose for i in range(n)], k)]
    held = [q for t, task in enumerate(tasks) for q in _queries(t, task, range(task.chose, len(task.words)), k)]
    return _as_tokens(model, tasks, first, form, between), _as_tokens(model, tasks, held, form, between), short


def _queries(t: int, task: _Task, words: Sequence[int], k: int) -> Iterator[_Query]:
    """Yield a query about each of the words, with examples drawn at random."""
    rng = Random(0)
    for word in words:
        drawn = rng.sample([i for i in range(task.chose) if i != word], max(k, 2))
        step = rng.randrange(1, max(k, 2))
        foil = rng.choice([i for i, other in enumerate(task.ids) if other != task.ids[word]])
        yield _Query(t, word, tuple(drawn[:k]), tuple([*drawn[step:], *drawn[:step]][:k]), foil)


def _as_tokens(model: Model, tasks: Sequence[_Task], queries: Sequence[_Query], form: str, between: str) -> Shots:
    def text(q: _Query, labels: Sequence[int]) -> str:
        words, said = tasks[q.task].words, tasks[q.task].labels
        *front, last = (form.replace(_WORD, words[i]) for i in (*q.others[: len(labels)], q.word))
        told = [f + continuation(f, said[label]) for f, label in zip(front, labels, strict=True)]
        return between.join([*told, last])

    texts = zip(*([text(q, labels) for labels in (q.others, q.labels, ())] for q in queries), strict=True)
    shown, shuffled, bare = (model.tokens(list(some)) for some in texts)
    return Shots(
        tuple(task.name for task in tasks),
        torch.tensor([q.task for q in queries]),
        torch.tensor([q.word for q in queries]),
        shown,
        shuffled,
        bare,
        torch.tensor([tasks[q.task].ids[q.word] for q in queries]),
        torch.tensor([tasks[q.task].ids[q.foil] for q in queries]),
    )
