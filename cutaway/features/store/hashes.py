"""Keyed hashes of tokens and documents: priorities that no order of reading changes, and contexts seen before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cutaway.core.record import hash_tensors, hash_text
from cutaway.streams.packing import Contexts
from cutaway.streams.sources import Document, Documents

GRAM = 8  # tokens of a fingerprint
DUPLICATE = 0.6  # share of a context's fingerprints that were seen before, from which on it is a duplicate
_ONE_IN = 8  # fingerprints of this share are compared
_FEW = 3  # with fewer of them, whole contexts are compared
_FACTOR = 0x5851F42D4C957F2D


def mix(x: Int[Tensor, "*shape"], seed: int = 0) -> Int[Tensor, "*shape"]:
    """Return numbers of 63 bits, not negative, that look random and depend on `x` and the seed alone (SplitMix64)."""
    x = x + _signed(0x9E3779B97F4A7C15 * (seed + 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return _shifted(x ^ _shifted(x, 31), 1)


def hash_contexts(ids: Int[Tensor, "row position"]) -> Int[Tensor, "row"]:
    """Return a hash of each row of token ids, padding included."""
    return mix((mix(ids) * _powers(ids.shape[1]).to(ids.device)).sum(1))


def hash_document(document: Document) -> int:
    """Return a number of 63 bits that depends on a document's content alone."""
    text = hash_text(document) if isinstance(document, str) else hash_tensors({"ids": torch.as_tensor(document)})
    return int(text, 16) >> 1


def draw(number: int, seed: int, purpose: str) -> float:
    """Return a number from 0 to 1 that depends on a document's hash, the seed and the purpose."""
    return int(hash_text(str(number), str(seed), purpose), 16) / 2**64


@dataclass
class HashedDocuments:
    """Documents that are hashed as they are read.

    Attributes:
        documents: the source.
        hashes: the hash of each document that was read, by number.
    """

    documents: Documents
    hashes: dict[int, int] = field(default_factory=dict)

    def read(self, first: int) -> Iterator[Document]:
        """Return the documents from number `first` on."""
        for number, document in enumerate(self.documents.read(first), first):
            self.hashes[number] = hash_document(document)
            yield document

    def identity(self) -> dict[str, Any]:
        """Return the identity of the source."""
        return self.documents.identity()

    def forget(self, before: int) -> None:
        """Drop the hashes of documents before a number."""
        for number in [n for n in self.hashes if n < before]:
            del self.hashes[number]


class Seen:
    """Fingerprints of the contexts read so far: rolling hashes of 8 tokens, of which one in 8 is kept.

    A context is a duplicate if at least 60 % of its fingerprints were seen before, wherever they stood. Of contexts
    with fewer than three, copies of the whole are found. Memory is about a byte per token.
    """

    def __init__(self) -> None:
        self.runs = list[np.ndarray]()  # sorted, each longer than the next

    def duplicates(self, contexts: Contexts) -> Bool[Tensor, "row"]:
        """Return True for contexts that were seen before, and note the others."""
        whole = hash_contexts(contexts.ids.masked_fill(~contexts.real, -1))
        out = torch.zeros(len(whole), dtype=torch.bool)
        for row, (ids, real) in enumerate(zip(contexts.ids, contexts.real, strict=True)):
            own = _fingerprints(ids[real])
            own = own if len(own) >= _FEW else whole[row : row + 1].numpy()
            out[row] = bool(self._known(own).mean() >= DUPLICATE)
            if not out[row]:
                self._add(own)
        return out

    def tensor(self) -> Int[Tensor, "print"]:
        """Return all fingerprints, sorted."""
        every = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *self.runs]))
        self.runs = [every] if len(every) else []
        return torch.from_numpy(every)

    @classmethod
    def of_tensor(cls, prints: Int[Tensor, "print"]) -> Seen:
        """Return what `tensor` was taken of."""
        seen = cls()
        seen.runs = [prints.numpy().copy()] if len(prints) else []
        return seen

    def _known(self, prints: np.ndarray) -> np.ndarray:
        there = np.zeros(len(prints), dtype=bool)
        for run in self.runs:
            there |= np.take(run, np.searchsorted(run, prints), mode="clip") == prints
        return there

    def _add(self, prints: np.ndarray) -> None:
        """Take in a run, and join runs from the shortest on until each is longer than the next."""
        while self.runs and len(self.runs[-1]) <= len(prints):
            prints = np.union1d(self.runs.pop(), prints)
        self.runs.append(prints)


def _fingerprints(ids: Int[Tensor, "position"]) -> np.ndarray:
    """Return the different fingerprints of a context that are compared."""
    if len(ids) < GRAM:
        return np.empty(0, dtype=np.int64)
    total = mix((mix(ids).unfold(0, GRAM, 1) * _powers(GRAM)).sum(1))
    return np.unique(total[total % _ONE_IN == 0].numpy())


@lru_cache(4)
def _powers(n: int) -> Int[Tensor, "n"]:
    """Return the powers of an odd number, which make the sum of products a rolling hash."""
    return torch.tensor([_signed(pow(_FACTOR, i, 1 << 64)) for i in range(1, n + 1)])


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift to the right as numbers without a sign are shifted."""
    return (x >> by) & ((1 << (64 - by)) - 1)
