"""Running statistics of all latents of a dictionary: one pass, mergeable, of a size that tokens do not change.

Of each latent: the number of tokens on which it is active, the sums of its values and their squares, the largest
|value|, a histogram of |value| in 64 bins of half an octave, the `top` largest examples (at most one per context), and
`samples` random ones of each octave. Keys of examples are hashes of content, so that neither the order of contexts nor
their division among processes changes which are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.dictionaries.code import SparseCode
from cutaway.features.store.best import Best, Examples
from cutaway.features.store.hashes import mix

BINS, OCTAVES, LEAST = 64, 32, -16  # half octaves from 2^LEAST on; what lies beyond falls into the first or last bin
_ROOT_TWO = 0x3504F3  # bits of the mantissa of √2 as a float32
_SUMS = ("count", "total", "square")


@dataclass(frozen=True)
class Rows:
    """Places of the tokens of a batch.

    Attributes:
        context: number of each token's context in the corpus; those of a batch follow each other.
        position: its position there.
        hash: hash of its context.
        width: positions of a context.
    """

    context: Int[Tensor, "token"]
    position: Int[Tensor, "token"]
    hash: Int[Tensor, "token"]
    width: int

    @property
    def place(self) -> Int[Tensor, "token"]:
        """The place of each token in the corpus, counted through all contexts."""
        return self.context * self.width + self.position

    def to(self, device: torch.device) -> Self:
        """Return the same places on another device."""
        return type(self)(self.context.to(device), self.position.to(device), self.hash.to(device), self.width)


@dataclass(frozen=True)
class Entries:
    """Active latents of a batch, sorted by latent and then by token.

    Attributes:
        latent: the latent.
        row: number of the token in the batch.
        value: its activation, not 0.
    """

    latent: Int[Tensor, "entry"]
    row: Int[Tensor, "entry"]
    value: Float[Tensor, "entry"]

    @classmethod
    def of(cls, code: SparseCode) -> Self:
        """Return the entries of a code."""
        latent, row, value = code.index.reshape(-1), code.tokens, code.value.reshape(-1).float()
        if not bool(value.all()):  # padding of codes of a fixed width
            latent, row, value = (t[value != 0] for t in (latent, row, value))
        latent, order = latent.sort(stable=True)
        return cls(latent, row[order], value[order])


@dataclass
class Tally:
    """Statistics of the latents of one dictionary so far.

    Attributes:
        count: tokens on which each latent is active.
        total: sum of its values.
        square: sum of their squares.
        largest: largest |value|.
        histogram: tokens by bin of |value|.
        top: the largest examples, one slot per latent.
        sampled: random examples, one slot per latent and octave that it reaches.
        slot: the slot of each latent and octave, −1 for none.
        seed: of the random examples.
    """

    count: Int[Tensor, "latent"]
    total: Float[Tensor, "latent"]
    square: Float[Tensor, "latent"]
    largest: Float[Tensor, "latent"]
    histogram: Int[Tensor, "latent bin"]
    top: Best
    sampled: Best
    slot: Int[Tensor, "latent octave"]
    seed: int

    @classmethod
    def empty(
        cls, latents: int, top: int, samples: int, width: int, seed: int, device: torch.device | str = "cpu"
    ) -> Self:
        """Return the statistics of no tokens; `width` is that of the windows around examples."""
        return cls(
            torch.zeros(latents, dtype=torch.long, device=device),
            torch.zeros(latents, dtype=torch.double, device=device),
            torch.zeros(latents, dtype=torch.double, device=device),
            torch.zeros(latents, device=device),
            torch.zeros(latents, BINS, dtype=torch.long, device=device),
            Best.empty(latents, top, width, device),
            Best.empty(0, samples, width, device),
            torch.full((latents, OCTAVES), -1, device=device),
            seed,
        )

    def update(self, entries: Entries, rows: Rows) -> None:
        """Take in the active latents of a batch."""
        latent, value, n = entries.latent, entries.value, len(self.count)
        if not len(latent):
            return
        size, wide = value.abs(), value.double()
        self.count += torch.bincount(latent, minlength=n)
        self.total += torch.bincount(latent, wide, minlength=n)
        self.square += torch.bincount(latent, wide.square(), minlength=n)
        self.largest.scatter_reduce_(0, latent, size, "amax")
        bins = bin_of(size)
        self.histogram += torch.bincount(latent * BINS + bins, minlength=n * BINS).view(n, BINS)
        priority = mix(rows.hash[entries.row] ^ mix(rows.position[entries.row] * n + latent), self.seed)

        def take(number: Tensor) -> Examples:
            return rows.place[entries.row[number]], value[number], _windows(entries, rows, number, self.width)

        key = (size.view(torch.int32).long() << 32) | (priority >> 31)
        self.top.offer(*self._largest(latent, rows.context[entries.row], key), take)
        self.sampled.offer(*self._drawn(latent * OCTAVES + bins // 2, priority), take)

    def merge(self, other: Tally) -> None:
        """Take in the statistics of other tokens."""
        for name in _SUMS:
            getattr(self, name).add_(getattr(other, name))
        self.largest = torch.maximum(self.largest, other.largest)
        self.histogram += other.histogram
        self.top.merge(torch.arange(len(self.count)), other.top)
        groups = (other.slot.flatten() >= 0).nonzero()[:, 0]
        self.sampled.merge(self._slots(groups), other.sampled.rows(other.slot.flatten()[groups]))

    def settle(self) -> None:
        """Sort the slots of random examples by latent and octave, so that equal statistics are equal tensors."""
        groups = (self.slot.flatten() >= 0).nonzero()[:, 0]
        self.sampled = self.sampled.rows(self.slot.flatten()[groups])
        self.slot.view(-1)[groups] = torch.arange(len(groups), device=groups.device)

    def moved(self, context: Int[Tensor, "context"], width: int) -> None:
        """Renumber the contexts of the corpus that examples stand in."""
        for best in (self.top, self.sampled):
            there = best.place.clamp(min=0)
            new = context[there // width] * width + there % width
            best.place = torch.where(best.place < 0, -1, new)

    @property
    def width(self) -> int:
        """Width of the windows around examples."""
        return self.top.window.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        own = {f.name: t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}
        return own | self.top.tensors("top.") | self.sampled.tensors("sampled.")

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], seed: int, device: torch.device | str = "cpu") -> Self:
        """Return what `tensors` was taken of, on a device, with memory of its own."""
        held = {n: t.to(device, copy=True) for n, t in tensors.items()}
        top, sampled = (Best.of_tensors(held, f"{n}.") for n in ("top", "sampled"))
        own = {f.name: held[f.name] for f in fields(cls) if f.name in held}
        return cls(**own, top=top, sampled=sampled, seed=seed)

    def _largest(self, latent: Tensor, context: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the latents whose best example of some context is better than their last, with keys and numbers."""
        local = context - context.min()
        n, contexts = len(self.count), int(local.max()) + 1
        cell = latent * contexts + local
        best = key.new_full((n * contexts,), -1).scatter_reduce_(0, cell, key, "amax")
        won = (best[cell] == key).nonzero()[:, 0]
        number = torch.zeros_like(best)
        number[cell[won]] = won
        best, number = best.view(n, contexts), number.view(n, contexts)
        better = (best.amax(1) > self.top.key[:, -1]).nonzero()[:, 0]
        return better, best[better], number[better]

    def _drawn(self, group: Tensor, priority: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the slots that random examples go to, with keys and numbers of the first candidates of each."""
        last = torch.cat([self.sampled.key[:, -1], group.new_full((1,), -1)])  # without a slot, all are better
        number = (priority > last[self.slot.flatten()[group]]).nonzero()[:, 0]
        number = number[priority[number].argsort(descending=True)]
        number = number[group[number].argsort(stable=True)]
        groups, size = group[number].unique_consecutive(return_counts=True)
        rank = torch.arange(len(number), device=group.device) - (size.cumsum(0) - size).repeat_interleave(size)
        kept = rank < self.sampled.size
        cell = (torch.arange(len(groups), device=group.device).repeat_interleave(size)[kept], rank[kept])
        keys, numbers = (group.new_full((len(groups), self.sampled.size), -1) for _ in range(2))
        keys[cell], numbers[cell] = priority[number[kept]], number[kept]
        return self._slots(groups), keys, numbers

    def _slots(self, groups: Int[Tensor, "group"]) -> Int[Tensor, "group"]:
        """Return the slots of latents and octaves; who has none gets one."""
        flat = self.slot.view(-1)
        new = groups[flat[groups] < 0]
        flat[new] = torch.arange(len(self.sampled.key), len(self.sampled.key) + len(new), device=flat.device)
        self.sampled.grow(len(self.sampled.key) + len(new))
        return flat[groups]


def bin_of(size: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Return the bin of positive numbers, from their bits: the same on every machine."""
    bits = size.view(torch.int32).long()
    half = (bits & 0x7FFFFF) >= _ROOT_TWO
    return (2 * ((bits >> 23) - 127 - LEAST) + half).clamp(0, BINS - 1)


def edges() -> Float[Tensor, "edge"]:
    """Return the edges of the bins, 0 and ∞ at the ends."""
    inner = 2.0 ** (LEAST + torch.arange(1, BINS) / 2)
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), torch.inf)])


def _windows(entries: Entries, rows: Rows, number: Int[Tensor, "n"], width: int) -> Float[Tensor, "n offset"]:
    """Return the activations around some entries, as multiples of each entry's own: neighbours in the order of entries.

    Within a latent, entries are in the order of tokens, so what lies in a window are the next entries on both sides.
    """
    before = width // 2
    out = torch.zeros(len(number), width, device=number.device)
    out[:, before] = 1.0
    place, last = rows.place[entries.row], len(entries.row) - 1
    for step, reach in ((1, width - 1 - before), (-1, before)):
        at, mine = number, torch.arange(len(number), device=number.device)
        while len(at):
            at = at + step
            own, here = number[mine], at.clamp(0, last)
            away = place[here] - place[own]
            near = (at == here) & (entries.latent[here] == entries.latent[own]) & (away.abs() <= reach)
            near &= place[here] // rows.width == place[own] // rows.width
            at, mine = at[near], mine[near]
            out[mine, before + away[near]] = entries.value[at] / entries.value[number[mine]]
    return out.clamp(-65504, 65504)
