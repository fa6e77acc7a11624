"""Which latents fire together: the partners of each latent, from the codes in a store.

On each token the 64 strongest latents count. With n_i the tokens of latent i among N, the partners of i are the
latents j of largest normalised pointwise mutual information, log(n_ij N / n_i n_j) / −log(n_ij / N), among those with
at least three tokens together (Bouma 2009). Of many files of codes, eight that lie evenly apart are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutaway.core.files import read_tensors
from cutaway.core.progress import advance

STRONGEST, TOGETHER = 64, 3
_FILES = 8  # of codes that are read, so that memory does not grow with tokens
_LATENTS, _ROWS = 256, 32  # whose tokens together are counted at once, and whose partners are ranked at once


def partners(files: Sequence[Path], latents: int, tokens: int, most: int) -> dict[str, Tensor]:
    """Return up to `most` partners of each latent (−1 where there are fewer), tokens together, and tokens of each.

    Args:
        files: codes, a file for some of the tokens.
        latents: number of latents.
        tokens: tokens whose codes all files hold.
        most: number of partners.
    """
    read = [files[i * len(files) // _FILES] for i in range(_FILES)] if len(files) > _FILES else list(files)
    active = [_matrix(read_tensors(f)[0], latents) for f in read]
    tokens = tokens if len(read) == len(files) else sum(m.shape[1] for m in active)
    own = np.zeros(latents, dtype=np.int64)
    for m in active:
        own += np.diff(m.indptr)
    partner = np.full((latents, most), -1, dtype=np.int32)
    together = np.zeros((latents, most), dtype=np.int64)
    for first in range(0, latents, _LATENTS):
        some = slice(first, min(first + _LATENTS, latents))
        both = _nothing(some, latents)
        for m in active:
            both = both + m[some].astype(np.int32) @ m.T
        for row in range(some.start, some.stop, _ROWS):
            part = slice(row, min(row + _ROWS, some.stop))
            counts = both[row - first : part.stop - first].tocoo()
            _best(counts, part, own, tokens, partner[part], together[part])
        advance(some.stop, latents)
    found = {"partner": partner, "together": together, "own": own, "tokens": np.array(tokens)}
    return {n: torch.from_numpy(x) for n, x in found.items()}


def _best(both: Any, some: slice, own: np.ndarray, tokens: int, partner: np.ndarray, together: np.ndarray) -> None:
    """Fill in the partners of some latents, from the numbers of tokens that they have together with all."""
    i, j, n = both.row, both.col, both.data
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
    """Return which latents are active on which tokens of a shard, the strongest of each token: [latent token] of bytes.

    Five bytes an entry are all that stays of a file; the matrix with its tokens first is made where it is multiplied.
    """
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

    return sparse.csr_array((some.stop - some.start, latents), dtype=np.int64)
