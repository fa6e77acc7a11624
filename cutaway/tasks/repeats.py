"""Random tokens said twice: the evidence for heads that look back.

The tokens of a block are drawn without replacement from the vocabulary, special tokens left out, so nothing but the
first block tells what comes next in the second, and every token of the second has one earlier occurrence (Olsson et
al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.core.refuse import Call, Refused
from cutaway.core.repeat import Made
from cutaway.core.stats import generator
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens, batch
from cutaway.models.vocabulary import special_ids


@dataclass(frozen=True)
class Repeats:
    """Sequences of random tokens, each a block said twice.

    A beginning-of-text token stands before them where the tokenizer has one.

    Attributes:
        n: number of sequences.
        length: number of tokens in a block.
        seed: of the tokens.
    """

    n: int = 32
    length: int = 24
    seed: int = 0

    def __post_init__(self):
        if self.n < 1 or self.length < 2:
            asked = Call("Repeats", {"n": self.n, "length": self.length})
            raise Refused(asked, "a repeat needs a sequence, and two tokens to tell apart", "use for example 32 and 24")

    def __len__(self) -> int:
        return self.n

    @property
    def made(self) -> Made:
        """The recipe by which they are made again."""
        flags = {"": self.n, "length": self.length, "seed": self.seed}
        return Made(f"ca.tasks.Repeats({self.n}, {self.length}, {self.seed})", flags)

    def identity(self) -> dict[str, Any]:
        """Say in a record which sequences these are."""
        return {"name": "random tokens said twice", "prompts": self.n, "length": self.length, "seed": self.seed}

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"prompts": self.n}

    def bind(self, model: Model) -> Tokens:
        """Return the sequences as tokens of one model.

        Raises:
            Refused: the vocabulary is smaller than a block, or a sequence longer than the model takes.
        """
        pool = ordinary_ids(model)
        if len(pool) < self.length:
            what, why = f"blocks of {self.length} random tokens", f"the vocabulary has {len(pool)} that are not special"
            raise Refused(what, why, "use shorter blocks")
        g, first = generator(self.seed), beginning(model)
        blocks = [pool[torch.randperm(len(pool), generator=g)[: self.length]].tolist() for _ in range(self.n)]
        return model.tokens(batch([first + block * 2 for block in blocks]))


def ordinary_ids(model: Model) -> Int[Tensor, "id"]:
    """Return the ids of a vocabulary, without special tokens."""
    usual = torch.ones(model.shape.d_vocab, dtype=torch.bool)
    special = special_ids(model.tokenizer)
    usual[special[special < len(usual)]] = False
    return usual.nonzero()[:, 0]


def beginning(model: Model) -> list[int]:
    """Return the beginning-of-text token, where the tokenizer has one."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return [] if bos is None else [bos]
