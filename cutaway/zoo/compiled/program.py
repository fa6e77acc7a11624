"""A program of the zoo: its expression, an implementation in plain Python to hold it against, and random prompts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cutaway.core.refuse import Refused
from cutaway.zoo.compiled.language import Input, Variable, indices, mapped, schedule, select

if TYPE_CHECKING:
    from cutaway.zoo.compiled.compiler import Compiled

BOS, UNKNOWN = "<bos>", "<unk>"
_TRIES = 1000


@dataclass(frozen=True)
class Line:
    """A prompt of a program and its counterfactual of the same length, which has another answer, the foil."""

    clean: str
    corrupt: str
    answer: str
    foil: str


@dataclass(frozen=True)
class Program:
    """A program of the zoo.

    Attributes:
        name: its name.
        says: what the model says next, in words.
        words: the vocabulary, without the beginning of the text.
        expression: makes the expression that is compiled.
        answer: the next word after some words, in plain Python; None where it is not defined.
        draw: random words of a length, whose last position is asked.
        shortest: the length of the shortest prompt.
        longest: the length of the longest prompt.
    """

    name: str
    says: str
    words: tuple[str, ...]
    expression: Callable[[], Variable]
    answer: Callable[[list[str]], str | None]
    draw: Callable[[random.Random, int], list[str]]
    shortest: int = 4
    longest: int = 8

    @cached_property
    def compiled(self) -> Compiled:
        """The program laid out in layers, with variables beside it that it does not use."""
        from cutaway.zoo.compiled.compiler import lay_out

        program = self.expression()
        return lay_out(program, self.words, self.longest, _unused(program, self.longest))

    def model(self) -> Any:
        """Return the compiled model of transformers, a `GPT2LMHeadModel`, and its tokenizer."""
        from cutaway.zoo.compiled.compiler import emit

        return emit(self.compiled), self.tokenizer()

    def tokenizer(self) -> Any:
        """Return the tokenizer: words, with or without spaces between them, behind the beginning of the text."""
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        from cutaway.zoo.compiled.compiler import SPARE

        ids = {w: i for i, w in enumerate((BOS, UNKNOWN, *self.words))}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
        longest_first = "|".join(map(re.escape, sorted(self.words, key=len, reverse=True)))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(longest_first), "isolated")]
        )
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=BOS,
            unk_token=UNKNOWN,
            model_max_length=self.longest + SPARE,
            clean_up_tokenization_spaces=False,
        )

    def lines(self, n: int, seed: int = 0) -> list[Line]:
        """Return `n` random prompts with their counterfactuals, the same for the same seed.

        The two are drawn alike and apart, so that a counterfactual varies all that a prompt of its length can vary.

        Raises:
            Refused: hardly any two prompts of one length have different answers.
        """
        rng, found = random.Random(f"{self.name} {seed}"), list[Line]()
        for _ in range(n * _TRIES):
            if len(found) == n:
                return found
            length = rng.randint(self.shortest, self.longest)
            clean, corrupt = self.draw(rng, length), self.draw(rng, length)
            answer, foil = self.answer(clean), self.answer(corrupt)
            if answer is not None and foil is not None and answer != foil:
                found.append(Line(" ".join(clean), " ".join(corrupt), answer, foil))
        raise Refused(f"{n} prompts of {self.name}", "its answers hardly differ", "ask for fewer")


def _unused(program: Variable, longest: int) -> tuple[Variable, ...]:
    """Return what a program does not use: the word before, what followed the same word, and which words repeat."""
    inputs = [v for v in schedule(program) if isinstance(v, Input)]
    said = next(v for v in inputs if isinstance(v.values[0], str))
    index = next((v for v in inputs if isinstance(v.values[0], int)), None) or indices(longest)
    before = select(index, index, lambda key, query: key == query - 1).take(said)
    follower = select(before, said, lambda key, query: key == query).take(said)
    again = mapped(lambda n: n > 1, select(said, said, lambda key, query: key == query).width(longest))
    return follower, again
