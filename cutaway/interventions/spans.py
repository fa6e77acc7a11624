"""Roles of tokens in a prompt (subject, next, last …), so that prompts of different lengths and words can be averaged.

As Meng et al. 2022 average: the subject's first, middle and last tokens, the token after it, further ones, and the
prompt's last. Every token has one role: a subject of one token is its last, a subject at the end leaves the prompt no
last token, and the last token is never called next. Where no pair names a subject, the tokens that the
corruption changes stand for it, with what lies between them. A position over prompts of different words has the name of
its role, for the word of one prompt would speak for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.refuse import Code, Refused
from cutaway.interventions.components import positions
from cutaway.tasks.bound import Bound

ROLES = ("before", "first {} token", "middle {} tokens", "last {} token", "next token", "further tokens", "last token")


@dataclass(frozen=True)
class Roles:
    """The roles that occur, in the order of a prompt, and which of them each token has (−1 beyond a prompt's end)."""

    names: tuple[str, ...]
    index: Int[Tensor, "prompt token"]

    @property
    def has(self) -> Bool[Tensor, "role prompt"]:
        """Which prompts have a token of each role."""
        return (self.index == torch.arange(len(self.names))[:, None, None]).any(-1)

    def averaged(
        self, values: Float[Tensor, "*cell token prompt"], rows: list[int]
    ) -> Float[Tensor, "*cell role prompt"]:
        """Return the values of every token of some prompts of one length, as means over each role's tokens; NaN
        where a prompt has none, or where one of its values is NaN.
        """
        tokens = self._of(rows)[..., : values.shape[-2]].to(values.dtype)
        unknown = torch.einsum("...tp,rpt->...rp", values.isnan().to(values.dtype), tokens) > 0
        mean = torch.einsum("...tp,rpt->...rp", values.nan_to_num(), tokens) / tokens.sum(-1)
        return mean.masked_fill(unknown, torch.nan)

    def tokens_of(self, cells: Bool[Tensor, "layer role"], rows: list[int]) -> Bool[Tensor, "layer token"]:
        """Return the tokens that any of some prompts has in the roles that are True."""
        return cells.float() @ self._of(rows).any(1).float() > 0

    def _of(self, rows: list[int]) -> Bool[Tensor, "role prompt token"]:
        return self.index[rows] == torch.arange(len(self.names))[:, None, None]


def subject_or_changed(bound: Bound) -> tuple[Bool[Tensor, "batch position"], str]:
    """Return the columns of each prompt's subject, or where a pair names none, of the tokens that its corruption
    changes; and which of the two it is, in words."""
    subject = bound.span("subject")
    named = subject.any(1)
    says = "the subject" if bool(named.all()) else "the tokens that the corruption changes"
    if bool(named.any()) and not bool(named.all()):
        says = "the subject; where a pair names none, " + says
    return torch.where(named[:, None], subject, bound.changed), says


def differ(bound: Bound) -> bool:
    """Return True if prompts differ in length or in where their subject stands, and all have one."""
    where, _ = subject_or_changed(bound)
    lengths, moved = bound.clean.lengths, bool((where != where[:1]).any())
    return bool(where.any(1).all()) and (bool((lengths != lengths[0]).any()) or moved)


def roles(bound: Bound) -> Roles:
    """Return the role of every token of every prompt.

    Raises:
        Refused: a pair that names no subject and whose corruption changes nothing.
    """
    where, _ = subject_or_changed(bound)
    if not bool(where.any(1).all()):
        raise Refused(
            "roles of tokens", "a pair names no subject and changes nothing", ("give ", Code("pairs with subject="))
        )
    lengths, front = bound.clean.lengths.tolist(), bound.clean.column(0).tolist()
    index = torch.full((len(bound), max(lengths)), -1)
    for i, n in enumerate(lengths):
        span = where[i].nonzero()[:, 0] - front[i]
        first, last = int(span.min()), int(span.max())
        index[i, :n] = 5
        index[i, last + 1 : last + 2] = 4
        index[i, n - 1] = 6
        index[i, : last + 1] = 2
        index[i, :first], index[i, first], index[i, last] = 0, 1, 3
    found = sorted(set(index[index >= 0].tolist()))
    word = "subject" if any(p.subject for p in bound.pairs) else "changed"
    place = torch.full((len(ROLES) + 1,), -1)
    place[found] = torch.arange(len(found))  # the entry behind the last role stands for none
    return Roles(tuple(ROLES[r].format(word) for r in found), place[index])


def position_names(bound: Bound) -> list[str]:
    """Return the name of each position: its word, if all prompts share it there, else its role.

    Names that repeat have the position behind them, and so have all where prompts differ in length. A position with
    different roles is called by its number alone.
    """
    tokens, places = bound.clean, positions(bound.clean)
    where, _ = subject_or_changed(bound)
    word = "subject" if any(p.subject for p in bound.pairs) else "changed"
    spans = [
        (row.nonzero()[:, 0] - front).tolist() for row, front in zip(where, tokens.column(0).tolist(), strict=True)
    ]
    each = [_called(n, span, word) for n, span in zip(tokens.lengths.tolist(), spans, strict=True)]
    names, called = [], [tokens.names(i) for i in range(len(tokens))]
    for p in places:
        words = {row[p] for row in called}
        found = words if len(words) == 1 else {roles[p] for roles in each}
        found = found - {"first"} if tokens.uneven and found == {"first", "before"} else found  # counted from the end
        names.append(found.pop() if len(found) == 1 else "")
    if tokens.uneven:
        return [f"{name}@{p}" for name, p in zip(names, places, strict=True)]
    return [f"@{p}" if not n else f"{n}·{p}" if names.count(n) > 1 else n for n, p in zip(names, places, strict=True)]


def _called(length: int, span: list[int], word: str) -> list[str]:
    """Return the role of every token of one prompt in a word or two."""
    first, last = (span[0], span[-1]) if span else (length, length)
    names = ["before" if p < first else f"middle {word}" if p < last else "further" for p in range(length)]
    names[0] = "first"
    if last + 1 < length:
        names[last + 1] = "next"
    names[-1] = "last"
    if span:
        names[first], names[last] = (f"first {word}", f"last {word}") if first < last else (word, word)
    return names if span else ["" if n == "before" else n for n in names]
