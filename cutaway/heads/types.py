"""Types of attention heads: one row a type, which says at which keys a head of that type looks.

The score of a head is its attention to these keys, summed over the keys and averaged over the queries that have any.
The first token of a sequence is never a query: it has only itself to look at.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.refuse import Call, Refused, nearest
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

LOCAL = 5  # positions that a local window reaches back
Keys = Bool[Tensor, "batch q_pos k_pos"]


@dataclass(frozen=True)
class Sequences:
    """Positions of a batch of sequences, and the keys that each query may look at; padding is none of them.

    The queries are all positions, or some of them.

    Attributes:
        asked: the token ids of the queries.
        ids: the token ids of the keys.
        back: number of positions that a key lies before a query; negative behind it.
        key: the position of each key in its own sequence.
        allowed: True for a query and a key that are both tokens of the sequence, the key not behind the query.
        delimiter: True at keys that are punctuation or a line break.
    """

    asked: Int[Tensor, "batch q_pos"]
    ids: Int[Tensor, "batch k_pos"]
    back: Int[Tensor, "batch q_pos k_pos"]
    key: Int[Tensor, "batch 1 k_pos"]
    allowed: Keys
    delimiter: Bool[Tensor, "batch 1 k_pos"]

    @staticmethod
    def of(
        tokens: Tokens, delimiter: Bool[Tensor, "batch k_pos"] | None = None, queries: slice = slice(None)
    ) -> Sequences:
        """Return the sequences of a batch of tokens; `queries` are the columns of the queries."""
        at, real = tokens.position_ids, tokens.mask
        back = at[:, queries, None] - at[:, None, :]
        allowed = (back >= 0) & real[:, queries, None] & real[:, None, :]
        marks = torch.zeros_like(real) if delimiter is None else delimiter
        return Sequences(tokens.ids[:, queries], tokens.ids, back, at[:, None, :], allowed, marks[:, None, :])

    @property
    def same(self) -> Keys:
        """True where query and key are the same token."""
        return self.asked[:, :, None] == self.ids[:, None, :]

    @property
    def after_same(self) -> Keys:
        """True where the key follows an occurrence of the query's token."""
        return torch.cat([torch.zeros_like(self.same[..., :1]), self.same[..., :-1]], -1) & (self.key > 0)

    @property
    def query(self) -> Int[Tensor, "batch q_pos k_pos"]:
        """The position of each query in its own sequence."""
        return self.back + self.key

    def looked_at(self, row: HeadType) -> Keys:
        """Return the keys at which a head of a type looks."""
        return row.keys(self) & self.allowed & (self.query > 0)


def delimiters(model: Model, tokens: Tokens) -> Bool[Tensor, "batch position"]:
    """Return True at tokens that are punctuation or a line break; nowhere without a tokenizer."""
    if model.tokenizer is None:
        return torch.zeros_like(tokens.mask)
    ids, place = tokens.ids.unique(return_inverse=True)
    found = [_delimits(text) for text in model.text.token_texts(ids)]
    return torch.tensor(found, device=place.device)[place] & tokens.mask


def _delimits(text: str) -> bool:
    marks = text.strip()
    return all(unicodedata.category(c)[0] == "P" for c in marks) if marks else "\n" in text


@dataclass(frozen=True)
class HeadType:
    """A type of attention head.

    Attributes:
        name: the name in the field.
        keys: returns the keys at which it looks, among those that it may look at.
        writes: 1 if a head of this type must also raise the tokens at its keys, −1 if it must lower them, else 0.
    """

    name: str
    keys: Callable[[Sequences], Keys]
    writes: int = 0


def _induction(s: Sequences) -> Keys:
    return s.after_same & (s.back > 0)


#: order of the entries of the axis `type`
TYPES = (
    HeadType("previous token", lambda s: s.back == 1),
    HeadType("current token", lambda s: s.back == 0),
    HeadType("first token", lambda s: (s.key == 0) & (s.back > 0)),
    HeadType("duplicate token", lambda s: s.same & (s.back > 0)),
    HeadType("prefix matching", _induction),
    HeadType("induction", _induction, writes=1),
    HeadType("anti-induction", _induction, writes=-1),
    HeadType("delimiter", lambda s: s.delimiter & (s.back > 0)),
    HeadType("local window", lambda s: (s.back > 0) & (s.back <= LOCAL) & (s.query >= 2 * LOCAL)),
)


def chosen(names: Sequence[str]) -> tuple[HeadType, ...]:
    """Return the types of these names, all if there are none.

    Raises:
        Refused: no type has that name.
    """
    known = {row.name: row for row in TYPES}
    for name in names:
        if name not in known:
            close = nearest(name, list(known))
            why = "no type has that name" + (f"; did you mean {close}?" if close else "")
            raise Refused(f"type {name!r}", why, f"use one of: {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names)) or TYPES


def check_least(name: str, least: float, of: str = "attention") -> None:
    """Refuse a share that no head can pass, asked of the method of this name."""
    if not 0 <= least < 1:
        raise Refused(Call(name, {"least": least}), f"a score is a share of {of}", "ask for 0 to below 1")


def ranked(
    claimed: Float[Tensor, "layer head"], score: Float[Tensor, "layer head"], layers: Sequence[object]
) -> list[str]:
    """Return the claimed heads as `layer.head`, the largest scores first."""
    at = (claimed > 0).nonzero().tolist()
    at.sort(key=lambda where: -float(score[tuple(where)]))
    return [f"{layers[i]}.{h}" for i, h in at]
