"""A task: pairs of prompts with answers, the metric, what the corruption does, and the truth where it is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from cutaway.core import repeat as again
from cutaway.core.record import hash_text
from cutaway.core.refuse import Refused
from cutaway.core.repeat import Made
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound, bind, narrowed
from cutaway.tasks.pair import Pair, Truth
from cutaway.tasks.readouts import Readout, readout


@dataclass(frozen=True)
class Task:
    """Prompts, answers, metric and truth.

    Attributes:
        name: what the task is called in records.
        pairs: the clean and corrupt prompts with answer and foil.
        metric: what is measured: the name of a readout, a readout (of logits at any position, or of activations), or a
            function (logits, answers, foils) → [batch] of the last logits.
        corruption: what the corrupt prompts change, in words.
        truth: what is known to be so in a model's world.
        options: the options of the recipe that made it.
        made: how it can be made again; None if made by hand.
    """

    name: str
    pairs: Sequence[Pair]
    metric: str | Readout | Callable[..., Tensor] = "logit_diff"
    corruption: str = ""
    truth: Truth | None = None
    options: dict[str, Any] = field(default_factory=dict)
    made: Made | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "pairs", tuple(self.pairs))
        readout(self.metric)
        if not self.pairs:
            raise Refused(f"task {self.name!r}", "it has no prompts", "give at least one pair")

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def identity(self) -> dict[str, Any]:
        """Return the description of the task for records: name, hash, size, metric, corruption and options."""
        texts = [
            "\x1f".join((p.clean, p.corrupt, p.answer, p.foil, *p.answers, "|", *p.foils, str(p.joined)))
            for p in self.pairs
        ]
        return {
            "name": self.name,
            "hash": hash_text(readout(self.metric).name, *texts),
            "prompts": len(self.pairs),
            "metric": readout(self.metric).name,
            "corruption": self.corruption,
            "options": dict(self.options),
        }

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"prompts": len(self.pairs)}

    def bind(self, model: Model, metric: str | None = None) -> Bound:
        """Return the task as tokens of one model, ready to be measured, by another metric than its own if one is named.

        Raises:
            Refused: a pair of unequal token length, an answer equal to its foil, or one of several tokens under a
                metric of one next token alone.
        """
        return bind(self.pairs, readout(metric or self.metric), model)

    def narrow(self, model: Model) -> Task:
        """Return the same task with answers of several tokens cut down to the first token where answer and foil differ.

        What the two share before that token is put at the end of both prompts, so the question stays the same.

        Raises:
            Refused: one of the two is a beginning of the other, or the tokenizer gives no offsets.
        """
        done = replace(self, pairs=tuple(narrowed(self.pairs, model)))
        return made(done, self.after(".narrow(model)", narrow=True), model)

    def take(self, n: int) -> Task:
        """Return the first `n` pairs."""
        return made(replace(self, pairs=self.pairs[:n]), self.after(f".take({n})"))

    def split(self, share: float = 0.5, seed: int = 0) -> tuple[Task, Task]:
        """Return two disjoint tasks, the first with `share` of every group: to fit on one and measure on the other.

        Pairs with the same clean prompt stay together.

        Raises:
            Refused: one part would be empty.
        """
        order = list(dict.fromkeys((p.group, p.clean) for p in self.pairs))
        rng = random.Random(seed)
        rng.shuffle(order)
        first: set[tuple[str, str]] = set()
        for group in dict.fromkeys(g for g, _ in order):
            mine = [key for key in order if key[0] == group]
            first.update(mine[: round(share * len(mine))])
        parts = [tuple(p for p in self.pairs if ((p.group, p.clean) in first) == side) for side in (True, False)]
        if not all(parts):
            why = f"{len(self.pairs)} pairs leave one part empty"
            raise Refused(f"split of task {self.name!r} at {share}", why, "use more pairs or another share")
        halves = enumerate(replace(self, pairs=p) for p in parts)
        one, other = (made(t, self.after(f".split({share!r}, {seed!r})[{i}]")) for i, t in halves)
        return one, other

    def after(self, step: str, **flags: Any) -> Made | None:
        """Return the recipe of this task after one more step in Python, with the flags that mean the same, if any."""
        if again.made("task", self) is not self.made or self.made is None:
            return None
        return self.made.then(step, f"no flag says task{step}" if step and not flags else "", **flags)


def made(task: Task, how: Made | None, model: Model | None = None) -> Task:
    """Return the task, with how it was made (None where it was made by hand) and the model that it was made for."""
    if how is not None and model is not None:
        how = replace(how, needs={"model": model.made.python if model.made is not None else ""})
    return replace(task, made=None if how is None else how.of(task, _look))


def _look(task: Task) -> dict[str, Any]:
    return {"pairs": task.pairs, "metric": task.metric, "truth": task.truth}
