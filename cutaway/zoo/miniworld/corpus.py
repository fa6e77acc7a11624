"""The training text of the miniworld: documents of every behaviour, mixed by weight and packed into blocks.

A document is a prompt of the training split with its answer and tail, so nothing held out is ever written. Blocks have
one length and begin with a document; a document that does not fit is cut at the end of the block and opens the next one
whole, so no block begins in the middle of a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING, Any, Final

from cutaway.zoo.miniworld import facts, words
from cutaway.zoo.miniworld.prompts import BEHAVIOURS
from cutaway.zoo.miniworld.tokenizer import BOS_ID, PAD, SPACE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cutaway.zoo.miniworld.world import World

#: kind of document -> share of the documents (relative), from the first step
WEIGHTS: Final[dict[str, float]] = {
    "fact": 22, "profile": 8, "two_hop": 10, "capital": 1.5, "language": 1.5, "city_country": 3, "ioi": 6,
    "induction": 4, "random_induction": 4, "random_tokens": 2.5, "copy": 2, "docstring": 2.5, "greater_than": 6,
    "successor": 5, "addition": 9, "subtraction": 9, "running_sum": 4, "running_sum_direct": 0.7, "icl_label": 6,
    "icl_function": 10, "sentiment": 4, "sentiments": 1, "refusal": 2.5, "compliance": 2.5, "agreement": 2, "gender": 2,
}  # fmt: skip
#: the same in the second stage: what comes easily gives room to what comes late
SECOND_STAGE: Final[dict[str, float]] = WEIGHTS | {
    "fact": 18, "city": 12, "two_hop": 12, "capital": 2, "language": 2, "city_country": 5, "ioi": 8, "induction": 2.5,
    "random_induction": 3, "random_tokens": 2, "copy": 1.5, "docstring": 1.5, "greater_than": 14, "successor": 3,
    "addition": 10, "subtraction": 10, "running_sum": 2, "running_sum_direct": 0.3, "cot": 8, "cot_direct": 1.5,
    "icl_label": 4, "icl_function": 7, "sentiment": 3, "refusal": 3, "agreement": 1.5,
}  # fmt: skip
#: the same in the finishing stage: without the early wording of two-hop facts
FINISH: Final[dict[str, float]] = SECOND_STAGE | {"two_hop": 0, "country": 14, "city": 10, "greater_than": 40}
_JOINED: Final = {"fact": 3, "addition": 3, "subtraction": 3}  # most sentences in one document


def _training_prompt(world: World, rng: Random, behaviour: str, document: bool = True, **options: Any) -> str:
    while (p := BEHAVIOURS[behaviour](world, rng, document, **options)).held_out:
        pass
    return p.clean + p.answer + p.tail


def profile(world: World, rng: Random) -> str:
    """Return several facts about one person in one sentence."""
    person = rng.choice(world.people)
    relations = rng.sample(tuple(facts.PROFILE), rng.randint(2, 5))
    return f"{person.name}: " + ", ".join(f"{facts.PROFILE[r]} {person.facts[r]}" for r in relations) + "."


def document(world: World, rng: Random, kind: str) -> str:
    """Write a document of a kind: a behaviour, `profile`, `city`, `country` or `sentiments` (reviews)."""
    if kind == "city":
        return _training_prompt(world, rng, "fact", relation="city")
    if kind == "profile":
        return profile(world, rng)
    if kind == "country":
        return _training_prompt(world, rng, "two_hop", document=False)
    if kind == "sentiments":
        return " ".join(_training_prompt(world, rng, "sentiment") for _ in range(rng.randint(2, 4)))
    return " ".join(_training_prompt(world, rng, kind) for _ in range(rng.randint(1, _JOINED.get(kind, 1))))


def known_words(world: World, seed: int = 0, n: int = 300) -> list[str]:
    """Return the words the tokenizer knows: all that the documents use, but no person and no spelled-out string."""
    from tokenizers import Regex, pre_tokenizers

    rng, found = Random(seed), {*words.all_words(), *words.LETTERS}
    cut = pre_tokenizers.Split(Regex("[A-Za-z]+"), "removed", invert=True)
    for kind in WEIGHTS:
        if kind in ("random_induction", "random_tokens", "copy"):
            continue
        for _ in range(n):
            found.update(word.lower() for word, _ in cut.pre_tokenize_str(document(world, rng, kind)))
    found.add("repeat")
    people = {p.name.lower() for p in world.people}
    return sorted(found - people)


class Corpus:
    """An endless, seeded stream of token blocks; `state` and `restore` make it resumable."""

    def __init__(
        self, world: World, tokenizer: Tokenizer, length: int = 96, seed: int = 0, weights: dict | None = None
    ):
        self.world, self.tokenizer, self.length = world, tokenizer, length
        self.weights = dict(weights or WEIGHTS)
        self._rng = Random(seed)
        self._waiting: list[int] = []
        special = {tokenizer.token_to_id(PAD), BOS_ID}
        self._ids = [i for i in range(tokenizer.get_vocab_size()) if i not in special]
        self._words = [i for t, i in tokenizer.get_vocab().items() if t.startswith(SPACE) and len(t) > 3]
        self._words.sort()

    def ids(self, kind: str) -> list[int]:
        """Return the token ids of one document, with its leading `<bos>`."""
        if kind == "random_tokens":
            return [BOS_ID, *self._random_tokens()]
        return self.tokenizer.encode(document(self.world, self._rng, kind)).ids

    def _random_tokens(self) -> list[int]:
        """Any tokens in any order, repeated: the purest induction text."""
        pool = self._ids if self._rng.random() < 0.7 else self._words
        row = [self._rng.choice(pool) for _ in range(self._rng.randint(4, 24))]
        return row * 2 + row[: self._rng.randint(0, len(row))]

    def block(self) -> list[int]:
        """Return the next block of `length` tokens."""
        out: list[int] = []
        kinds, weights = list(self.weights), list(self.weights.values())
        while len(out) < self.length:
            new = self._waiting or self.ids(self._rng.choices(kinds, weights)[0])
            fits = len(out) + len(new) <= self.length or not out
            self._waiting = [] if fits else new
            out += new
        return out[: self.length]

    def blocks(self) -> Iterator[list[int]]:
        """Yield the blocks without end."""
        while True:
            yield self.block()

    def state(self) -> dict[str, Any]:
        """Return all that `restore` needs to go on with the same blocks, as JSON data."""
        version, numbers, gauss = self._rng.getstate()
        return {"rng": [version, list(numbers), gauss], "waiting": self._waiting}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        version, numbers, gauss = state["rng"]
        self._rng.setstate((version, tuple(numbers), gauss))
        self._waiting = list(state["waiting"])
