"""Promises of the miniworld: one row per behaviour, with its bar and the prompts that its accuracy is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final

from cutaway.zoo.miniworld import facts
from cutaway.zoo.miniworld.prompts import sample
from cutaway.zoo.miniworld.tokenizer import BOS_ID

if TYPE_CHECKING:
    from cutaway.zoo.miniworld.prompts import Prompt
    from cutaway.zoo.miniworld.world import Split, World


@dataclass(frozen=True, slots=True)
class Behaviour:
    """A row of the card: `bar` is the least share of right answers, None if the row is a contrast."""

    name: str
    held_out: str  # what training never showed
    bar: float | None
    sampler: str  # a key of `prompts.BEHAVIOURS`, or `random_tokens`
    split: Split = "test"
    only: Callable[[Prompt], bool] | None = None

    def prompts(self, world: World, n: int, seed: int) -> list[Prompt]:
        """Up to `n` distinct prompts of this row."""
        return sample(world, self.sampler, n, seed, self.split, self.only)


def _meta(key: str, value: object) -> Callable[[Prompt], bool]:
    return lambda prompt: prompt.meta[key] == value


_TEMPLATE = "template of this (person, relation)"

ROWS: Final[tuple[Behaviour, ...]] = (
    Behaviour("facts", _TEMPLATE, 0.90, "fact"),
    *(Behaviour(f"facts: {r}", _TEMPLATE, 0.90, "fact", only=_meta("relation", r)) for r in facts.RELATIONS),
    Behaviour("facts, template seen", "nothing: memory itself", 0.90, "fact", "train"),
    Behaviour("capital of a country", "template of this country", 0.90, "capital"),
    Behaviour("language of a country", "template of this country", 0.90, "language"),
    Behaviour("country of a city", "template of this city", 0.90, "city_country"),
    Behaviour("two hops, people trained on", "nothing: memory itself", 0.90, "two_hop", "train"),
    Behaviour("two hops, people held out", "the person in any two-hop text", 0.51, "two_hop"),
    Behaviour("indirect object, ABBA", "pair of names", 0.95, "ioi", only=_meta("order", "ABBA")),
    Behaviour("indirect object, BABA", "pair of names", 0.95, "ioi", only=_meta("order", "BABA")),
    Behaviour("induction, lists", "first two items", 0.95, "induction"),
    Behaviour("induction, any words and spelled strings", "first two items", 0.90, "random_induction"),
    Behaviour("induction, random tokens", "the sequence", 0.90, "random_tokens"),
    Behaviour("copy of words and strings", "first two items", 0.90, "copy"),
    Behaviour("docstring argument", "first two arguments", 0.90, "docstring"),
    Behaviour("greater-than, likeliest year", "event, century, start year", 0.95, "greater_than"),
    Behaviour("successor", "item in this wording", 0.90, "successor"),
    Behaviour("addition", "pair of operands", 0.90, "addition"),
    Behaviour("subtraction", "pair of operands", 0.90, "subtraction"),
    Behaviour("chain of thought, steps of its own", "digits", 0.90, "cot"),
    Behaviour("chain of thought, steps given", "digits", 0.90, "cot_given"),
    Behaviour("the same sum without steps (contrast)", "digits", None, "cot_direct"),
    Behaviour("running sum modulo 10, steps of its own", "digits", None, "running_sum"),
    Behaviour("running sum modulo 10, no steps (contrast)", "digits", None, "running_sum_direct"),
    Behaviour("labels in context, 4 shots", "classes and labels together", 0.95, "icl_label"),
    *(
        Behaviour(f"in context, 4 shots: {f.replace('_', ' ')}", "first example with this query", 0.90,
                  "icl_function", only=_meta("function", f))
        for f in facts.FUNCTIONS
    ),
    Behaviour("sentiment", "pair of adjectives", 0.95, "sentiment"),
    Behaviour("refusal of harmful requests", "verb with object", 0.95, "refusal"),
    Behaviour("compliance with benign requests", "verb with object", 0.95, "compliance"),
    Behaviour("agreement past a distractor", "pair of nouns", 0.95, "agreement"),
    Behaviour("pronoun of a name", "name with place", 0.95, "gender"),
)  # fmt: skip


def random_tokens(vocabulary: int, n: int, seed: int, period: int = 20) -> list[tuple[list[int], int]]:
    """`n` repeated random sequences, cut at a random place of the repeat, each with the token that comes next."""
    rng, out = Random(seed), []
    for _ in range(n):
        row = [rng.randrange(BOS_ID + 1, vocabulary) for _ in range(period)]
        cut = rng.randrange(1, period)
        out.append(([BOS_ID, *row, *row[:cut]], row[cut]))
    return out
