"""The latents of one dictionary in a store: statistics, examples, codes and partners, mapped into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.stats import wilson_interval
from cutaway.features.store.tally import OCTAVES, edges


@dataclass(frozen=True)
class Example:
    """A token on which a latent is active.

    Attributes:
        context: number of its context in the corpus.
        position: its position there.
        value: the activation.
        window: activations around it; those of masked tokens and beyond the context are 0.
        before: positions of the window in front of it.
        octave: exponent of two of |value| for a random example of its octave; None for one of the largest.
    """

    context: int
    position: int
    value: float
    window: Float[Tensor, "offset"]
    before: int
    octave: int | None = None


@dataclass(frozen=True)
class StoredLatents:
    """The latents of one dictionary in a store.

    Attributes:
        row: the dictionary's entry in the manifest.
        mapped: opens a file of the store as tensors.
        context_width: positions of a context.
        tokens: tokens that count.
    """

    row: Mapping[str, Any]
    mapped: Callable[[str], dict[str, Tensor]]
    context_width: int
    tokens: int

    def __len__(self) -> int:
        return self.row["latents"]

    @property
    def name(self) -> str:
        """Name of the dictionary."""
        return self.row["name"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The statistics, as `Tally` has them."""
        return self.mapped(self.row["tables"]["latents"]["file"])

    @property
    def count(self) -> Int[Tensor, "latent"]:
        """Tokens on which each latent is active."""
        return self.tensors["count"]

    @property
    def density(self) -> Float[Tensor, "latent"]:
        """Share of tokens on which each latent is active."""
        return (self.count.double() / self.tokens).float()

    def density_interval(self) -> Float[Tensor, "latent bound"]:
        """Return the 95 % interval of the density (Wilson), tokens taken as independent."""
        return wilson_interval(self.count.double() / self.tokens, self.tokens).float()

    def mean(self) -> Float[Tensor, "latent"]:
        """Return the mean of each latent where it is active; NaN of one that never is."""
        return (self.tensors["total"] / self.count).float()

    def quantile(self, latent: int, shares: Float[Tensor, "share"]) -> Float[Tensor, "share bound"]:
        """Return the ends of the bins of |value|, half octaves, in which quantiles of the active tokens lie; NaN for a
        latent that never fires.
        """
        histogram = self.tensors["histogram"][self.check(latent)]
        reached = histogram.cumsum(0).double() / histogram.sum()
        at = torch.searchsorted(reached, shares.double()).clamp(max=len(histogram) - 1)
        ends = edges()
        found = torch.stack([ends[at], ends[at + 1]], -1)
        return found.clamp(max=float(self.tensors["largest"][latent])).masked_fill(histogram.sum() == 0, torch.nan)

    def band(self, latent: int, octave: int) -> tuple[float, float]:
        """Return the quantiles of the active tokens between which an octave of |value| lies, exactly."""
        histogram = self.tensors["histogram"][latent].view(OCTAVES, 2).sum(1)
        below = int(histogram[:octave].sum())
        total = int(histogram.sum())
        return below / total, (below + int(histogram[octave])) / total

    def top(self, latent: int) -> list[Example]:
        """Return the examples of largest |value|, at most one per context, the largest first."""
        at = self.check(latent)
        return self._examples("top", at, [None] * self.tensors["top.key"].shape[1])

    def sampled(self, latent: int) -> list[Example]:
        """Return random examples of each octave of |value|, the highest octave first."""
        slots = self.tensors["slot"][self.check(latent)]
        out = list[Example]()
        for octave in reversed((slots >= 0).nonzero()[:, 0].tolist()):
            out += self._examples("sampled", int(slots[octave]), [octave] * self.tensors["sampled.key"].shape[1])
        return out

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """Yield the files of codes: `place` and `value` of active tokens by latent, each from its `first` on."""
        for row in self.row["codes"]:
            yield self.mapped(row["file"])

    def codes(self, latent: int) -> tuple[Int[Tensor, "active"], Float[Tensor, "active"]]:
        """Return the places in the corpus on which a latent is active, ascending, and its values, where codes are
        kept.
        """
        self.check(latent)
        place, value = list[Tensor](), list[Tensor]()
        for part in self.shards():
            some = slice(*part["first"][latent : latent + 2].tolist())
            place.append(part["place"][some].long())
            value.append(part["value"][some])
        if not place:
            return torch.empty(0, dtype=torch.long), torch.empty(0)
        order = torch.cat(place).argsort()
        return torch.cat(place)[order], torch.cat(value)[order]

    def partners(self, latent: int) -> list[tuple[int, int, int]]:
        """Return the partners of a latent: their number, tokens together, and the partner's own tokens."""
        part = self._partners
        pairs = zip(part["partner"][self.check(latent)].tolist(), part["together"][latent].tolist(), strict=True)
        return [(j, n, int(part["own"][j])) for j, n in pairs if j >= 0]

    @property
    def paired_tokens(self) -> int:
        """Number of tokens that partners were counted on."""
        return int(self._partners["tokens"])

    def paired(self, latent: int) -> int:
        """Return the tokens, of those that partners were counted on, on which a latent is active."""
        return int(self._partners["own"][self.check(latent)])

    @property
    def _partners(self) -> dict[str, Tensor]:
        if "partners" not in self.row["tables"]:
            raise Refused(f"partners in {self.name}", "this is the part of one process", "open the store of all parts")
        return self.mapped(self.row["tables"]["partners"]["file"])

    def check(self, latent: int) -> int:
        """Return the number of a latent, if there is one of that number.

        Raises:
            Refused: there is none.
        """
        if not 0 <= latent < len(self):
            raise Refused(f"latent {latent} of {self.name}", "there is no such latent", f"use 0 to {len(self) - 1}")
        return latent

    def _examples(self, kind: str, slot: int, octaves: list[int | None]) -> list[Example]:
        place, value, window = (self.tensors[f"{kind}.{n}"][slot] for n in ("place", "value", "window"))
        own = value[:, None] * window.float()
        before = window.shape[1] // 2
        rows, width = zip(place.tolist(), value.tolist(), own, octaves, strict=True), self.context_width
        return [Example(p // width, p % width, v, w, before, o) for p, v, w, o in rows if p >= 0]
