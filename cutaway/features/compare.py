"""Which latents of two dictionaries are the same, judged by where they fire?

Latents of two dictionaries (other layers, widths, seeds or models) on the same tokens: in one store, or in two whose
corpora hold the same contexts.

* `jaccard[latent]`: with A the tokens on which a latent of the first is active and B those of a latent of the second,
  |A ∩ B| / |A ∪ B| for the best B; `match` is its number.
* `interval`: 95 %, Wilson's, the tokens of the union taken as independent.
* Control (`null`): the best of the same latents of the second with the tokens moved along by a random number of
  contexts, so that densities and neighbourhoods stay and text does not.
* A latent that is never active on these tokens has 0 and the match −1.
* Known failures: firing together is not doing the same; dense latents overlap with everything, as the null shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.progress import advance
from cutaway.core.record import counting, machine, versions
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, wilson_interval
from cutaway.features.store.corpus import CODED, COUNTED
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.latents import StoredLatents

TOKENS = 1 << 18
_LATENTS = 256  # of the first that are compared at once


@dataclass(frozen=True, kw_only=True)
class MatchedLatents(Result, kind="matched_latents"):
    """The best match of each latent of one dictionary among those of another.

    Attributes:
        jaccard: tokens on which both are active, as a share of those on which either is.
        interval: of `jaccard`, 95 %.
        null: `jaccard` of the best match on other text.
        match: number of the best match; −1 for none.
    """

    jaccard: Float[Tensor, "latent"]
    interval: Float[Tensor, "latent bound"]
    null: Float[Tensor, "latent sample"]
    match: Int[Tensor, "latent"]


def compare(
    first: FeatureStore,
    second: FeatureStore | None = None,
    *,
    names: tuple[str | None, str | None] = (None, None),
    tokens: int = TOKENS,
    samples: int = 2,
    seed: int = 0,
) -> MatchedLatents:
    """Match the latents of two dictionaries by the tokens on which they are active.

    Args:
        first: the store of the first dictionary.
        second: that of the second; the same store if None.
        names: names of both dictionaries in their stores.
        tokens: compare on this many tokens at most.
        samples: number of moves behind the null.
        seed: of the moves.

    Raises:
        Refused: one dictionary twice, or stores without contexts in common whose codes are kept.
    """
    if samples < 1:
        raise Refused(Keyword("samples", samples), "a match stands beside its control", "use at least 1")
    other = first if second is None else second
    a, b = first.latents(names[0]), other.latents(names[1])
    if other.folder == first.folder and a.name == b.name:
        raise Refused(f"{a.name} and {b.name}", "they are one dictionary", "name two, or give another store")
    rows, g = _shared(first, other, tokens), np.random.default_rng(seed)
    with counting() as spent:
        x, y = _matrix(a, rows[0]), _matrix(b, rows[1])
        best, match, union = _matched(x, y)
        n = len(rows[0])
        moves = [int(n * m) for m in g.uniform(0.1, 0.9, samples)]
        null = [_matched(x, y[np.r_[m:n, :m]])[0] for m in moves]
    jaccard = torch.from_numpy(best).double()
    bounds = torch.stack([wilson_interval(j, max(int(u), 1)) for j, u in zip(jaccard, union, strict=True)])
    return MatchedLatents(
        jaccard=jaccard.float(),
        interval=bounds.float(),
        null=torch.from_numpy(np.stack(null, -1)).float(),
        match=torch.from_numpy(match),
        labels={"latent": [f"{i}" for i in range(len(a))], "bound": BOUNDS},
        units={"jaccard": "share of tokens", "null": "share of tokens"},
        record={
            "method": "features.compare",
            "answers": f"Which latents of {b.name} fire where those of {a.name} do?",
            "control": "moved_tokens",
            "subjects": {"first": first.identity(), "second": other.identity()},
            "dictionaries": [a.name, b.name],
            "tokens": n,
            "moves": moves,
            "seed": seed,
            "cost": {"forwards": 0.0, "backwards": 0.0, "seconds": spent.seconds},
            "versions": versions(),
            "machine": machine(),
        },
    )


def _shared(first: FeatureStore, second: FeatureStore, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places, in each store, of the same tokens, whose codes both have."""
    mine, theirs = (s.column("hash").numpy() for s in (first, second))
    _, one, two = np.intersect1d(mine, theirs, return_indices=True)
    order = one.argsort()
    contexts, kept = [one[order], two[order]], None
    if first.width != second.width:
        raise Refused("stores of other contexts", f"{first.width} and {second.width} tokens", "harvest them alike")
    for store, own in zip((first, second), contexts, strict=True):
        flags = store.column("flags").numpy()[own] & (COUNTED | CODED) == COUNTED | CODED
        kept = flags if kept is None else kept & flags
    assert kept is not None
    row, position = (x[:most] for x in np.nonzero(kept))
    if not len(row):
        raise Refused("two stores", "they have no tokens in common whose codes are kept", "harvest the same text")
    a, b = (own[row] * first.width + position for own in contexts)
    return a, b


def _matrix(known: StoredLatents, places: np.ndarray) -> Any:
    """Return which latents are active on which of the places, as a sparse matrix [place latent]."""
    from scipy import sparse

    order = places.argsort()
    row, column = list[np.ndarray](), list[np.ndarray]()
    for part in known.shards():
        place = part["place"].numpy()
        at = np.searchsorted(places, place, sorter=order).clip(max=len(places) - 1)
        there = places[order[at]] == place
        latent = np.repeat(np.arange(len(known)), part["first"].diff().numpy())
        row.append(order[at[there]])
        column.append(latent[there])
    i, j = np.concatenate(row), np.concatenate(column)
    return sparse.csr_array((np.ones(len(i), dtype=np.int32), (i, j)), shape=(len(places), len(known)))


def _matched(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best Jaccard index of each column of `x` among the columns of `y`, which it is, and their union."""
    n, m = (np.asarray(t.sum(0)).ravel() for t in (x, y))
    columns, total = x.tocsc(), x.shape[1]
    best, match, union = np.zeros(total), np.full(total, -1, dtype=np.int64), n.copy()
    for first in range(0, total, _LATENTS):
        some = slice(first, min(first + _LATENTS, total))
        both = (columns[:, some].T @ y).tocoo()
        either = n[some][both.row] + m[both.col] - both.data
        share = both.data / np.maximum(either, 1)
        order = np.lexsort((both.col, -share, both.row))
        rows, where = np.unique(both.row[order], return_index=True)
        top = order[where]
        best[first + rows], match[first + rows], union[first + rows] = share[top], both.col[top], either[top]
        advance(some.stop, total)
    return best, match, union
