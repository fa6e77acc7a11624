"""Which latents fire together: the partners of each latent, from the codes in a store.

On each token the 64 strongest latents count. With n_i the tokens of latent i among N, the partners of i are the
latents j of largest normalised pointwise mutual information, log(n_ij N / n_i n_j) / −log(n_ij / N), among those with
at least three tokens together (Bouma 2009). Of many files of codes, sixteen that lie evenly apart are read.

Memory depends neither on tokens nor on files: which latents are active on which tokens of a file lies in a temporary
file in two orders, by latent and by token, one of which is mapped at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cutaway.core.files import read_tensors, write_tensors
from cutaway.core.progress import advance

STRONGEST, TOGETHER = 64, 3
_FILES, _SCRATCH = 16, ".partners"  # files of codes that are read, and the folder of temporary files
_PAIRS, _ROWS = 1 << 19, 32  # of latents that are counted at once, and latents whose partners are ranked at once


def partners(files: Sequence[Path], latents: int, tokens: int, most: int) -> dict[str, Tensor]:
    """Return up to `most` partners of each latent (−1 where there are fewer), tokens together, and tokens of each.

    Args:
        files: codes, a file for some of the tokens.
        latents: number of latents.
        tokens: tokens whose codes all files hold.
        most: number of partners.
    """
    read = [files[i * len(files) // _FILES] for i in range(_FILES)] if len(files) > _FILES else list(files)
    partner = np.full((latents, most), -1, dtype=np.int32)
    together = np.zeros((latents, most), dtype=np.int64)
    scratch = files[0].parent / _SCRATCH if files else Path(_SCRATCH)
    try:
        active = [_Active.written(f, latents, scratch / f.name) for f in read]
        tokens = tokens if len(read) == len(files) else sum(a.tokens for a in active)
        own = sum((a.own for a in active), np.zeros(latents, dtype=np.int64))
        for some in _parts(own):
            both = _nothing(some, latents)
            for a in active:
                both = both + a.together(some)
            for row in range(some.start, some.stop, _ROWS):
                part = slice(row, min(row + _ROWS, some.stop))
                counts = both[row - some.start : part.stop - some.start].tocoo()
                _best(counts, part, own, tokens, partner[part], together[part])
            advance(some.stop, latents)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found = {"partner": partner, "together": together, "own": own, "tokens": np.array(tokens)}
    return {n: torch.from_numpy(x) for n, x in found.items()}


@dataclass(frozen=True)
class _Active:
    """Latents that are active on the tokens of a file of codes, the strongest of each token, in a file in two orders.

    Attributes:
        file: the file.
        tokens: its tokens.
        own: number of tokens on which each latent is active.
    """

    file: Path
    tokens: int
    own: np.ndarray

    @classmethod
    def written(cls, codes: Path, latents: int, file: Path) -> Self:
        """Return the latents of a file of codes, after writing them to a file."""
        by_latent = _matrix(read_tensors(codes)[0], latents)
        by_token = by_latent.tocsc()
        orders = (by_latent.indptr, by_latent.indices, by_token.indptr, by_token.indices)
        names = ("first", "token", "start", "latent")
        tensors: dict[str, Tensor] = dict(zip(names, map(torch.from_numpy, orders), strict=True))
        write_tensors(file, tensors, {"kind": "active"})
        return cls(file, by_latent.shape[1], np.diff(by_latent.indptr).astype(np.int64))

    def together(self, some: slice) -> Any:
        """Return the tokens that some latents have together with all: [some latent]."""
        from scipy import sparse

        mapped = {n: t.numpy() for n, t in read_tensors(self.file)[0].items()}
        first = mapped["first"][some.start : some.stop + 1]
        mine = mapped["token"][first[0] : first[-1]]
        ones = np.ones(max(len(mine), len(mapped["latent"])), dtype=np.int32)
        left = sparse.csr_array((ones[: len(mine)], mine, first - first[0]), shape=(len(first) - 1, self.tokens))
        every = (ones[: len(mapped["latent"])], mapped["latent"], mapped["start"])
        return left @ sparse.csr_array(every, shape=(self.tokens, len(self.own)))


def _parts(own: np.ndarray) -> Iterator[slice]:
    """Yield slices of latents that make at most `_PAIRS` pairs, from the tokens on which each is active."""
    pairs, first = np.minimum(own * STRONGEST, len(own)).cumsum(), 0
    while first < len(own):
        before = pairs[first - 1] if first else 0
        end = max(first + 1, int(np.searchsorted(pairs, before + _PAIRS, side="right")))
        yield slice(first, end)
        first = end


def _best(both: Any, some: slice, own: np.ndarray, tokens: int, partner: np.ndarray, together: np.ndarray) -> None:
    """Fill in the partners of some latents, from the numbers of tokens that they have together with all."""
    i, j, n = both.row, both.col, both.data.astype(np.int64)
    kept = (i + some.start != j) & (n >= TOGETHER)
    i, j, n = i[kept], j[kept], n[kept]
    share = n / max(tokens, 1)
    score = np.log(n * tokens / (own[i + some.start] * own[j])) / -np.log(np.minimum(share, 1 - 1e-12))
    order = np.lexsort((j, -score, i))
    i, j, n = i[order], j[order], n[order]
    rank = np.arange(len(i)) - np.searchsorted(i, i)
    first = rank < partner.shape[1]
    partner[i[first], rank[first]], together[i[first], rank[first]] = j[first], n[first]


def _matrix(shard: Mapping[str, Tensor], latents: int) -> Any:
    """Return which latents are active on which tokens of a shard, the strongest of each token: [latent token]."""
    from scipy import sparse

    first, place, value = shard["first"].numpy(), shard["place"].numpy(), shard["value"].abs().numpy()
    there = np.zeros(int(np.ptp(place)) + 1 if len(place) else 0, dtype=np.int32)
    at = place - (place.min() if len(place) else 0)
    there[at] = 1
    token = (there.cumsum(dtype=np.int32) - 1)[at]
    tokens = int(there.sum())
    if len(token) and np.bincount(token).max() > STRONGEST:
        strong = _strongest(token, value)
        token, first = token[strong], np.append(0, strong.cumsum())[first]
    return sparse.csr_array((np.ones(len(token), dtype=np.int8), token, first), shape=(latents, tokens))


def _strongest(token: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return True for the 64 entries of largest value of each token."""
    order = np.lexsort((-value, token))
    own = token[order]
    strong = np.zeros(len(token), dtype=bool)
    strong[order] = np.arange(len(own)) - np.searchsorted(own, own) < STRONGEST
    return strong


def _nothing(some: slice, latents: int) -> Any:
    from scipy import sparse

    return sparse.csr_array((some.stop - some.start, latents), dtype=np.int32)
