"""The behaviours and their prompts: one sampler a behaviour, and distinct prompts of a split.

The corpus writes its documents with the same samplers (`clean + answer + tail`), so a test prompt has exactly the form
of training, and differs only in being held out.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from cutaway.core.refuse import Refused
from cutaway.zoo.miniworld import conduct, knowledge, numbers, sequences
from cutaway.zoo.miniworld.facts import Facts, Split
from cutaway.zoo.miniworld.prompt import Prompt

Sampler = Callable[[Facts, Random, bool], Prompt]

#: draws without a new prompt after which a behaviour counts as exhausted
_PATIENCE = 3000

#: behaviour -> its sampler
BEHAVIOURS: dict[str, Sampler] = {
    f.__name__: f
    for f in (
        knowledge.fact, knowledge.two_hop, knowledge.capital, knowledge.language, knowledge.city_country,
        sequences.ioi, sequences.induction, sequences.random_induction, sequences.copy, sequences.docstring,
        numbers.greater_than, numbers.successor, numbers.addition, numbers.subtraction, numbers.running_sum,
        numbers.running_sum_direct, numbers.cot, numbers.cot_given, numbers.cot_direct,
        sequences.icl_label, sequences.icl_function,
        conduct.sentiment, conduct.refusal, conduct.compliance, conduct.agreement, conduct.gender,
    )
}  # fmt: skip


def sample(
    world: Facts, behaviour: str, n: int, seed: int, split: Split, only: Callable[[Prompt], bool] | None = None
) -> list[Prompt]:
    """Up to `n` distinct prompts of one split for which `only` holds, in a random order fixed by `seed`."""
    if behaviour not in BEHAVIOURS:
        raise Refused(
            what=f"prompts of the behaviour {behaviour!r}",
            why="the miniworld was not trained on it",
            instead=f"choose one of {', '.join(BEHAVIOURS)}",
        )
    rng = Random(f"{seed}|{behaviour}|{split}")
    out: dict[tuple[str, str], Prompt] = {}
    idle = 0
    while len(out) < n and idle < _PATIENCE:
        prompt = BEHAVIOURS[behaviour](world, rng, False)
        key = (prompt.clean, "" if behaviour == "greater_than" else prompt.answer)
        wanted = split == "any" or prompt.held_out == (split == "test")
        if wanted and key not in out and (only is None or only(prompt)):
            out[key], idle = prompt, 0
        else:
            idle += 1
    return list(out.values())
