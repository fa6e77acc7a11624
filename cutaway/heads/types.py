"""Types of attention heads: one row a type, which says at which keys a head of that type looks.

The score of a head is its attention to these keys, summed over the keys and averaged over the queries that have any.
The first token of a sequence is never a query: it has only itself to look at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cutaway.models.tokens import Tokens

Keys = Bool[Tensor, "batch q_pos k_pos"]


@dataclass(frozen=True)
class Sequences:
    """Positions of a batch of sequences, and the keys that each query may look at; padding is none of them.

    Attributes:
        ids: the token ids.
        back: number of positions that a key lies before a query; negative behind it.
        key: the position of each key in its own sequence.
        allowed: True for a query and a key that are both tokens of the sequence, the key not behind the query.
    """

    ids: Int[Tensor, "batch position"]
    back: Int[Tensor, "batch q_pos k_pos"]
    key: Int[Tensor, "batch 1 position"]
    allowed: Keys

    @staticmethod
    def of(tokens: Tokens) -> Sequences:
        """Return the sequences of a batch of tokens."""
        at, real = tokens.position_ids, tokens.mask
        back = at[:, :, None] - at[:, None, :]
        return Sequences(tokens.ids, back, at[:, None, :], (back >= 0) & real[:, :, None] & real[:, None, :])

    @property
    def same(self) -> Keys:
        """True where query and key are the same token."""
        return self.ids[:, :, None] == self.ids[:, None, :]

    @property
    def after_same(self) -> Keys:
        """True where the key follows an occurrence of the query's token."""
        return torch.cat([torch.zeros_like(self.same[..., :1]), self.same[..., :-1]], -1) & (self.key > 0)

    def looked_at(self, row: HeadType) -> Keys:
        """Return the keys at which a head of a type looks."""
        own = self.back + self.key  # the position of the query
        return row.keys(self) & self.allowed & (own > 0)


@dataclass(frozen=True)
class HeadType:
    """A type of attention head.

    Attributes:
        name: the name in the field.
        keys: returns the keys at which it looks, among those that it may look at.
        copies: True if a head of this type must also write what it reads: its OV circuit raises the attended token.
    """

    name: str
    keys: Callable[[Sequences], Keys]
    copies: bool = False


#: order of the entries of the axis `type`
TYPES = (
    HeadType("previous token", lambda s: s.back == 1),
    HeadType("current token", lambda s: s.back == 0),
    HeadType("first token", lambda s: (s.key == 0) & (s.back > 0)),
    HeadType("duplicate token", lambda s: s.same & (s.back > 0)),
    HeadType("induction", lambda s: s.after_same & (s.back > 0), copies=True),
)
