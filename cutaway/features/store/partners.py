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
_LATENTS = 256  # whose partners are found at once


def partners(files: Sequence[Path], latents: int, tokens: int, most: int) -> dict[str, Tensor]:
    """Return up to `most` partners of each latent (−1 where there are fewer), tokens together, and tokens of each.

    Args:
        files: codes, a file for some of the tokens.
        latents: number of latents.
        tokens: tokens whose codes all files hold.
        most: number of partners.
    """
    read = [files[i * len(files) // _FILES] for i in range(_FILES)] if len(files) > _FILES else list(files)
    rows = [_matrix(read_tensors(f)[0], latents) for f in read]
    tokens = tokens if len(read) == len(files) else sum(m.shape[0] for m in rows)
    columns = [m.tocsc() for m in rows]
    own = np.zeros(latents, dtype=np.int64)
    for m in rows:
        own += np.asarray(m.sum(0)).ravel()
    partner = np.full((latents, most), -1, dtype=np.int32)
    together = np.zeros((latents, most), dtype=np.int64)
    for first in range(0, latents, _LATENTS):
        some = slice(first, min(first + _LATENTS, latents))
        both = _nothing(some, latents)
        for c, m in zip(columns, rows, strict=True):
            both = both + c[:, some].T @ m
        both = both.tocoo()
        _best(both, some, own, tokens, partner[some], together[some])
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
    """Return which latents are active on which tokens of a shard, the strongest of each token."""
    from scipy import sparse

    size, place, value = shard["first"].diff(), shard["place"].numpy(), shard["value"].abs().numpy()
    latent = torch.arange(latents).repeat_interleave(size).numpy()
    row = np.unique(place, return_inverse=True)[1]
    if len(row) and np.bincount(row).max() > STRONGEST:
        order = np.lexsort((-value, row))
        latent, row = latent[order], row[order]
        strong = np.arange(len(row)) - np.searchsorted(row, row) < STRONGEST
        latent, row = latent[strong], row[strong]
    shape = (int(row.max()) + 1 if len(row) else 0, latents)
    return sparse.csr_array((np.ones(len(row), dtype=np.int32), (row, latent)), shape=shape)


def _nothing(some: slice, latents: int) -> Any:
    from scipy import sparse

    return sparse.csr_array((some.stop - some.start, latents), dtype=np.int64)
