"""Activations straight from the model: windows of tokens, each shuffled, in batches of one size.

A window holds `window` tokens in the order of the documents; it is permuted as a whole, by the seed and its number,
and handed out in batches. The order is thus random within windows and that of the documents between them; for a
random order over everything, harvest to disk. Nothing is kept between windows, so the cursor is small: the group of
contexts at which the window begins, and how many batches of it were handed out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from cutaway.core.address import Address
from cutaway.core.record import hash_text
from cutaway.core.refuse import Keyword, Refused
from cutaway.streams.batch import Batch
from cutaway.streams.masks import MASKING, Masking
from cutaway.streams.order import permutation
from cutaway.streams.packing import PACKING, Cursor, Packing
from cutaway.streams.reader import Models, Reader
from cutaway.streams.sources import Documents


@dataclass(frozen=True)
class _Start:
    """Start of a window: `skip` tokens into the group at a cursor; the counts are those before that group."""

    number: int
    cursor: Cursor
    skip: int
    counts: Mapping[str, int]


class LiveStream:
    """Batches of activations from documents through a model, shuffled in windows; see the module for the order.

    Batches have `batch` tokens, but the last. `epochs=None` reads the documents again and again, each time in another
    order. `dtype` is that of the activations handed out; they are computed in the model's own. With `fast_kernels` they
    are computed by faster kernels that agree with the model's own within rounding (`models.access.fast_kernels`).

    Several models, `{"base": …, "tuned": …}`, read the same contexts: batches have activations under `NAME:ADDRESS`,
    and a token that is masked in one is masked in all. Their tokenizers must agree.
    """

    def __init__(
        self,
        model: Models,
        documents: Documents,
        sites: str | Address | Sequence[str | Address],
        *,
        packing: Packing = PACKING,
        masking: Masking = MASKING,
        batch: int = 4096,
        window: int = 1 << 16,
        dtype: torch.dtype | str | None = None,
        seed: int = 0,
        epochs: int | None = 1,
        fast_kernels: bool = True,
    ):
        if batch < 1 or window < 1:
            raise Refused(
                (Keyword("batch", batch), ", ", Keyword("window", window)),
                "both are at least 1",
                "use for example 4096 and 65536",
            )
        self.reader = Reader(model, documents, sites, packing, masking, dtype, fast_kernels)
        self.size, self.seed, self.epochs = batch, seed, epochs
        self.window = -(-window // batch) * batch  # whole batches
        self._begin(_Start(0, Cursor(), 0, dict(self.reader.rule.counts)), 0)

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of the activations by address."""
        return self.reader.widths

    @property
    def beginning(self) -> str:
        """The token that contexts begin with, in words."""
        return self.reader.packer.beginning

    @property
    def masked(self) -> dict[str, Any]:
        """The rule of the masking in words, with thresholds and counts so far."""
        return self.reader.rule.as_dict()

    @property
    def epoch(self) -> int:
        """Number of times the documents had been read through before the last token of the window handed out."""
        return self._epoch

    def identity(self) -> dict[str, Any]:
        """Return the model, documents and options."""
        own = {"batch": self.size, "window": self.window, "seed": self.seed}
        return {"kind": "live stream", **self.reader.identity(), **own}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while self._held is None or self._served * self.size >= len(self._held):
            fresh, self._held = self._held is not None, None
            start, held = next(self._windows)
            self._start, self._held = start, held
            self._served = 0 if fresh else self._served
            self._order = permutation(len(held), self.seed, "window", start.number).to(held.ids.device)
        at = self._served * self.size
        self._served += 1
        return self._held.rows(self._order[at : at + self.size])

    def state(self) -> dict[str, Any]:
        """Return the cursor, JSON-ready."""
        s = self._start
        return {
            "kind": "live stream",
            "key": self._key(),
            "served": self._served,
            "window": s.number,
            "skip": s.skip,
            "cursor": s.cursor.as_dict(),
            "counts": dict(s.counts),
            "way": self.reader.noted_kernels(),
            "thresholds": dict(self.reader.rule.thresholds),
        }

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go to where `state` was taken; the window it lies in is computed again when a batch is asked for.

        Raises:
            Refused: the state of another stream: other model, documents or options.
        """
        if state.get("key") != self._key():
            why = "it is of another stream: other model, documents or options"
            raise Refused("a stream's state", why, "make the stream as it was made then")
        self.reader.rule.thresholds = dict(state["thresholds"])
        self.reader.restore_kernels(state["way"])
        start = _Start(state["window"], Cursor(**state["cursor"]), state["skip"], dict(state["counts"]))
        self._begin(start, state["served"])
        return self

    def _begin(self, start: _Start, served: int) -> None:
        self._start, self._served, self._epoch = start, served, start.cursor.epoch
        self._held: Batch | None = None
        self._order = torch.empty(0, dtype=torch.long)
        self._windows = self._from(start)

    def _from(self, start: _Start) -> Iterator[tuple[_Start, Batch]]:
        """Yield the windows from one on, each with where it begins."""
        rule = self.reader.rule
        rule.counts = before = dict(start.counts)
        filling, here, skip = _Filling(self.window), start, start.skip
        for group in self.reader.groups(start.cursor, self.epochs):
            at, skip = skip, 0
            while at < len(group.batch):
                if filling.filled == 0:
                    here = replace(here, cursor=group.cursor, skip=at, counts=before)
                at += filling.put(group.batch, at)
                self._epoch = group.cursor.epoch
                if filling.filled == self.window:
                    yield here, filling.batch()
                    filling, here = _Filling(self.window), replace(here, number=here.number + 1)
            before = dict(rule.counts)
        if filling.filled:
            yield here, filling.batch()

    def _key(self) -> str:
        return hash_text(self.reader.key, str(self.size), str(self.window), str(self.seed))


class _Filling:
    """A window being filled."""

    def __init__(self, size: int):
        self.size, self.filled = size, 0
        self.held: Batch | None = None

    def put(self, batch: Batch, at: int) -> int:
        """Take what there is room for, from token `at` on; returns how many tokens that is."""
        part = batch.rows(slice(at, at + self.size - self.filled))
        if self.held is None:
            self.held = Batch(
                {a: x.new_empty(self.size, x.shape[1]) for a, x in part.acts.items()},
                *(t.new_empty(self.size) for t in part.words),
            )
        where = slice(self.filled, self.filled + len(part))
        pairs = zip((*self.held.acts.values(), *self.held.words), (*part.acts.values(), *part.words), strict=True)
        for into, x in pairs:
            into[where] = x
        self.filled += len(part)
        return len(part)

    def batch(self) -> Batch:
        """Return the tokens that it holds."""
        assert self.held is not None
        return self.held.rows(slice(self.filled))
