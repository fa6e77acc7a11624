"""Looks of one head, read while a forward runs, sequence by sequence; patterns are reduced at once and not kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.heads.pattern_sums import Watch, reach_of
from cutaway.heads.streamed import bucket_names, edges
from cutaway.heads.types import TYPES, Sequences, delimiters
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.models.vocabulary import special_ids

#: types with keys of their own, but for the first token, which is left out here
KEYS = [row for row in {row.keys: row for row in reversed(TYPES)}.values() if row.name != "first token"][::-1]
NONE = "none of these"
WINDOW = 24  # most tokens of a pattern that is kept


@dataclass(frozen=True)
class Window:
    """The query of a sequence that looks hardest.

    Attributes:
        sequence: the row of the sequence.
        query: the query's position.
        key: the position that it looks at most.
        strength: the attention that this one gets.
        row: attention of the query to every position up to it.
    """

    sequence: int
    query: int
    key: int
    strength: float
    row: Float[Tensor, "position"]


@dataclass(frozen=True)
class Reading:
    """Looks of the queries of one sequence; the first token is neither query nor key.

    Attributes:
        sequence: the row of the sequence.
        strength: the largest attention of each query.
        key: the position that it goes to.
        matches: True where a type looks at this key; last, where none does.
        chance: the same of keys drawn at random.
        distance: attention by bucket of distance.
        shifted: the same with every query's attention moved around in a circle of its keys.
    """

    sequence: int
    strength: Float[Tensor, "query"]
    key: Int[Tensor, "query"]
    matches: Bool[Tensor, "type query"]
    chance: Bool[Tensor, "sample type query"]
    distance: Float[Tensor, "bucket"]
    shifted: Float[Tensor, "sample bucket"]


class Looks:
    """Looks of one head at a text, filled by a forward that shows them the activations of `watching`.

    A sequence that is there already is left out.

    Attributes:
        found: the looks of every sequence.
        windows: the queries of some sequences that look hardest, the hardest first.
        pattern: attention among the last tokens up to the first of these.
        buckets: the names of the buckets of distance.
        ids: the token ids of the text.
        mass: the attention that each of them gets, without first and special tokens.
        value: their values summed with this weight; None if values have no place of their own.
    """

    def __init__(self, model: Model, tokens: Tokens, place: Address, windows: int, samples: int, seed: int):
        self.model, self.tokens, self.layer, self.head = model, tokens, place.layer or 0, place.unit or 0
        self.n_windows, self.samples, self.g = windows, samples, generator(seed)
        self.marks, longest = delimiters(model, tokens), int(tokens.lengths.max())
        self.least, self.buckets = torch.tensor(edges(longest)), bucket_names(longest)
        self.once, self.ids = {*tokens.firsts()}, tokens.ids[tokens.mask].unique().cpu()
        self.usual = ~torch.isin(self.ids, special_ids(model.tokenizer))
        self.mass, self.value = torch.zeros(len(self.ids)), None
        self.found, self.windows, self.pattern = list[Reading](), list[Window](), torch.empty(0, 0)
        self._v = dict[int, Tensor]()

    def watching(self) -> dict[Address, Watch]:
        """Return what sees the head's pattern and, where they have a place of their own, its values."""
        try:
            self.model.places(f"v.{self.layer}")
        except Refused:
            return {Address("pattern", self.layer): self._see_pattern}
        return {Address("v", self.layer): self._see_values, Address("pattern", self.layer): self._see_pattern}

    def _see_values(self, rows: Sequence[int], v: Tensor) -> None:
        head = self.head * v.shape[2] // self.model.shape.n_heads
        self._v = {row: v[b, self.tokens.mask[row], head].float().cpu() for b, row in enumerate(rows)}

    def _see_pattern(self, rows: Sequence[int], pattern: Tensor) -> None:
        reach = reach_of(self.model, self.tokens.rows(list(rows)), pattern)
        for b, row in enumerate(rows):
            real = self.tokens.mask[row]
            if row in self.once and int(real.sum()) > 1:
                self._add(row, pattern[b, self.head][real][:, real].float().cpu(), min(reach, int(real.sum())))

    def _add(self, row: int, a: Float[Tensor, "q_pos k_pos"], reach: int) -> None:
        strength, key = a[1:, 1:].max(-1)
        key = key + 1
        self._count(row, a)
        self.found.append(self._reading(row, a, strength, key, reach))
        q = int(strength.argmax()) + 1
        window = Window(row, q, int(key[q - 1]), float(strength[q - 1]), a[q, : q + 1].clone())
        self.windows = sorted([*self.windows, window], key=lambda w: (-w.strength, w.sequence))[: self.n_windows]
        if self.windows[0] is window:
            first = max(0, q + 1 - WINDOW)
            self.pattern = a[first : q + 1, first : q + 1].clone()

    def _count(self, row: int, a: Float[Tensor, "q_pos k_pos"]) -> None:
        """Add the attention that tokens get, and their values."""
        place = torch.searchsorted(self.ids, self.tokens.ids[row][self.tokens.mask[row]].cpu())[1:]
        mass = a[1:, 1:].sum(0) * self.usual[place]
        self.mass.index_add_(0, place, mass)
        if row in self._v:
            v = self._v[row][1:]
            self.value = v.new_zeros(len(self.ids), v.shape[1]) if self.value is None else self.value
            self.value.index_add_(0, place, mass[:, None] * v)

    def _reading(self, row: int, a: Tensor, strength: Tensor, key: Tensor, reach: int) -> Reading:
        s = Sequences.of(self.tokens.row(row), self.marks[row][self.tokens.mask[row]][None])
        looked = torch.stack([s.looked_at(one)[0, 1:].cpu() for one in KEYS])  # [type, query, key]
        looked = torch.cat([looked, ~looked.any(0, keepdim=True)])
        query = torch.arange(1, len(a))
        first = (query - reach + 1).clamp_min(1)
        drawn = torch.rand(self.samples, len(query), generator=self.g, dtype=torch.float64)
        chance = first + (drawn * (query - first + 1)).long()  # [sample, query]
        return Reading(
            row,
            strength,
            key,
            looked[:, query - 1, key],
            looked[:, query - 1, chance].movedim(0, 1),
            self._by_distance(a),
            torch.stack([self._by_distance(x) for x in self._shifted(a, reach)]),
        )

    def _by_distance(self, a: Float[Tensor, "q_pos k_pos"]) -> Float[Tensor, "bucket"]:
        """Return the attention of all queries to all keys but the first by distance, averaged over queries."""
        at, a = torch.arange(1, len(a)), a[1:, 1:]
        far = torch.bucketize((at[:, None] - at).clamp_min(0), self.least, right=True) - 1
        return torch.zeros(len(self.buckets)).index_add_(0, far.flatten(), a.flatten()) / len(a)

    def _shifted(self, a: Float[Tensor, "q_pos k_pos"], reach: int) -> Iterator[Float[Tensor, "q_pos k_pos"]]:
        """Yield patterns in which every query's attention is moved by a random step in a circle of its keys."""
        at = torch.arange(len(a))
        first = (at - reach + 1).clamp_min(1)[:, None]
        number = (at[:, None] - first + 1).clamp_min(1)
        for _ in range(self.samples):
            step = (torch.rand(len(a), 1, generator=self.g, dtype=torch.float64) * number).long()
            source = (first + (at - first + step) % number).clamp_max(len(a) - 1)
            yield torch.where((at <= at[:, None]) & (at >= first), a.gather(1, source), 0.0)
