"""Rungs: the strength of claim that a method's numbers support, and the words that each strength may use.

A rung is a step on Pearl's ladder of causation, as arXiv:2602.16698 applies it to claims about models: what is found
by looking (`observational`), by changing something in the forward pass (`interventional`), or by showing that this
input's output would have been different and that nothing else explains it (`counterfactual`). Every row of the method
table names its rung. Generated text must not use the words of a higher one: `exceeding` finds them. A first-order
estimate of an intervention stands on the rung of what it estimates; how good it is, is a matter of its audit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Rung = Literal["observational", "interventional", "counterfactual"]
NAMES: tuple[Rung, ...] = get_args(Rung)


@dataclass(frozen=True)
class Words:
    """The words that a rung adds to those of the rungs below it.

    Attributes:
        examples: verbs to use in text about such a result.
        pattern: regular expression of the words that need at least this rung.
    """

    examples: str
    pattern: str


WORDS: dict[Rung, Words] = {
    "observational": Words("is decodable, reads, writes, co-occurs with", r"(?!)"),
    "interventional": Words(
        "changes, suffices, restores, takes away",
        r"suffic\w+|restor\w+|(brings?|brought) (\S+ ){0,3}back|(takes?|took) (\S+ ){0,3}away"
        r"|mediat\w+|carr(y|ies|ied) the (answer|difference)|chang(e|es|ed) the (answer|prediction|output)",
    ),
    "counterfactual": Words(
        "because, causes", r"because|caus(e|es|ed)|the reasons? (for|why|of)|responsible for|explains? why|due to"
    ),
}


def exceeding(text: str, rung: Rung) -> list[str]:
    """Find the words of `text` that only a rung above `rung` may use, in reading order."""
    above = NAMES[NAMES.index(rung) + 1 :]
    if not above:
        return []
    pattern = rf"\b({'|'.join(WORDS[r].pattern for r in above)})\b"
    return [m[0] for m in re.finditer(pattern, text, re.IGNORECASE)]
