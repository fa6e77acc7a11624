"""Which latents are active more often in one corpus than in another?

Two stores of the same dictionary and model, of different documents. Rates are of tokens and not of documents, so that
documents need no equal lengths.

* `rate[latent, corpus]`: tokens on which the latent is active, as a share of the tokens that count.
* `difference[latent]` = rate in the second − rate in the first, with its 95 % interval: both rates are ratios of sums
  over documents, so tokens of one document are not taken as independent (linearised variance of a ratio, normal).
* `p[latent]`: d = difference / (its standard error + s₀), s₀ the median standard error of latents that are active, and
  its share among the d of all latents in permutations of the documents (SAM: Tusher et al. 2001). `q` are p-values
  after Benjamini and Hochberg; a latent differs where q ≤ 5 %.
* Control (`null`): the difference between random halves of the documents of the same sizes. `called` in the record is
  the number of latents that differ, beside the numbers that the same procedure calls in the permutations.
* Known failures: documents that are near copies of each other are not independent; a difference of topic, length or
  source is no difference of what you had in mind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.record import counting, machine, versions
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, false_discovery
from cutaway.features.store.corpus import CODED, COUNTED
from cutaway.features.store.feature_store import FeatureStore

LEVEL = 0.05  # of false discoveries
_WIDE = 1.96
_ALIKE = ("model", "packing", "masking", "width")  # in the manifests of stores that can be compared
_LEAST = 4  # documents of a corpus
_TRIED = 19  # permutations that are treated like the corpora themselves


@dataclass(frozen=True, kw_only=True)
class CorpusDifference(Result, kind="corpus_difference"):
    """Rates of latents in two corpora.

    Attributes:
        rate: share of tokens on which each latent is active.
        difference: of the rates, the second corpus less the first.
        interval: of `difference`, 95 %, over documents.
        null: `difference` between random halves of the documents.
        p: share of permutations that are as far apart.
        q: p-values after Benjamini and Hochberg.
    """

    rate: Float[Tensor, "latent corpus"]
    difference: Float[Tensor, "latent"]
    interval: Float[Tensor, "latent bound"]
    null: Float[Tensor, "latent sample"]
    p: Float[Tensor, "latent"]
    q: Float[Tensor, "latent"]


def corpora(
    first: FeatureStore,
    second: FeatureStore,
    *,
    dictionary: str | None = None,
    samples: int = 100,
    seed: int = 0,
) -> CorpusDifference:
    """Compare two corpora by how often latents are active in them.

    Args:
        first: the store of the first corpus, with codes.
        second: that of the second, of the same dictionary.
        dictionary: name of the dictionary, where there are several.
        samples: number of permutations of the documents.
        seed: of the permutations.

    Raises:
        Refused: stores of another model, dictionary or masking, or few documents with codes.
    """
    if samples < _TRIED:
        raise Refused(Keyword("samples", samples), "p-values are shares of permutations", f"use at least {_TRIED}")
    known = [s.latents(dictionary) for s in (first, second)]
    _check(first, second, [k.row["hash"] for k in known])
    g = np.random.default_rng(seed)
    with counting() as spent:
        parts = [_documents(s, k.name) for s, k in zip((first, second), known, strict=True)]
        sums = _Sums(parts)
        rate, difference, error = sums.split(sums.own[None])
        chance = [sums.split(g.permutation(sums.own)[None]) for _ in range(samples)]
    moved, errors = (np.concatenate([c[i] for c in chance]) for i in (1, 2))  # [sample latent]
    alive = sums.total > 0
    steady = float(np.median(error[0, alive]))
    d, of_chance = difference[0] / (error[0] + steady), moved / (errors + steady)
    p = _shares(d, of_chance, alive)
    q = _adjusted(p, alive)
    called = [
        int((_adjusted(_shares(row, np.delete(of_chance, i, 0), alive), alive) <= LEVEL).sum())
        for i, row in enumerate(of_chance[:_TRIED])
    ]
    return CorpusDifference(
        rate=torch.from_numpy(rate[0]).float(),
        difference=torch.from_numpy(difference[0]).float(),
        interval=torch.from_numpy(difference[0][:, None] + _WIDE * error[0][:, None] * np.array([-1, 1])).float(),
        null=torch.from_numpy(moved.T.copy()).float(),
        p=torch.from_numpy(p).float(),
        q=q,
        labels={"latent": _names(first, second, known[0].name), "corpus": ["first", "second"], "bound": BOUNDS},
        units=dict.fromkeys(("rate", "difference", "null"), "share of tokens") | {"p": "share", "q": "share"},
        reasons={"rate": "its interval is that of the difference", "p": "of permutations", "q": "of permutations"},
        record={
            "method": "features.corpora",
            "answers": "Which latents are active more often in one corpus than in another?",
            "control": "permuted_documents",
            "subjects": {"first": first.identity(), "second": second.identity()},
            "dictionary": known[0].name,
            "documents": [len(part[1]) for part in parts],
            "called": {"latents": int((q <= LEVEL).sum()), "in permutations": called, "level": LEVEL},
            "seed": seed,
            "cost": {"forwards": 0.0, "backwards": 0.0, "seconds": spent.seconds},
            "versions": versions(),
            "machine": machine(),
        },
    )


def _check(first: FeatureStore, second: FeatureStore, hashes: list[str]) -> None:
    other = [n for n in _ALIKE if first.manifest[n] != second.manifest[n]]
    if hashes[0] != hashes[1]:
        other = ["dictionaries"]
    if other:
        instead = "harvest the second with like=FIRST" if other == ["masking"] else "harvest them alike"
        raise Refused("the corpora of two stores", f"their {other[0]} differ", instead)
    if first.manifest["key"] == second.manifest["key"]:
        raise Refused("the corpora of two stores", "they are one", "give another store")


def _documents(store: FeatureStore, name: str) -> tuple[Any, np.ndarray]:
    """Return the active tokens of each document and latent, as a sparse matrix, and the tokens of each document."""
    from scipy import sparse

    document, flags = (store.column(n).flatten().numpy() for n in ("document", "flags"))
    counted = flags & (COUNTED | CODED) == COUNTED | CODED
    numbers, tokens = np.unique(document[counted], return_counts=True)
    if len(numbers) < _LEAST:
        why = f"codes are kept of {len(numbers)} documents"
        raise Refused(f"corpus {str(store.folder)!r}", why, f"harvest at least {_LEAST} documents, with their codes")
    known = store.latents(name)
    total = sparse.csr_array((len(numbers), len(known)), dtype=np.float64)
    for part in known.shards():
        row = np.searchsorted(numbers, document[part["place"].numpy()])
        latent = np.repeat(np.arange(len(known)), part["first"].diff().numpy())
        total = total + sparse.csr_array((np.ones(len(row)), (row, latent)), shape=total.shape)
    return total, tokens.astype(np.float64)


class _Sums:
    """Active tokens of all documents of two corpora; `split` gives rates for any division of the documents in two.

    Attributes:
        own: True for documents of the second corpus.
        total: active tokens of each latent.
    """

    def __init__(self, parts: list[tuple[Any, np.ndarray]]):
        from scipy import sparse

        self.active = sparse.vstack([p[0] for p in parts]).tocsr()  # [document latent]
        self.tokens = np.concatenate([p[1] for p in parts])
        self.own = np.repeat([False, True], [len(p[1]) for p in parts])
        self.square, self.cross = self.active.power(2), self.active * self.tokens[:, None]
        self.total = np.asarray(self.active.sum(0)).ravel()

    def split(self, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rates [row latent corpus], their differences and standard errors [row latent].

        Args:
            second: True for the documents of the second corpus, for each row.
        """
        rates, variance = list[np.ndarray](), 0.0
        for which in (~second, second):
            w = which.astype(np.float64)
            n, m = w @ self.tokens, w.sum(1)
            rate = (self.active.T @ w.T).T / n[:, None]
            spread = (self.square.T @ w.T).T - 2 * rate * (self.cross.T @ w.T).T
            spread = spread + rate**2 * (w @ self.tokens**2)[:, None]
            rates.append(rate)
            variance = variance + spread.clip(min=0) * (m / (m - 1) / n**2)[:, None]
        return np.stack(rates, -1), rates[1] - rates[0], np.sqrt(variance)


def _shares(d: np.ndarray, chance: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Return the share of all statistics in the permutations that are at least as large; 1 for silent latents."""
    far = np.sort(np.abs(chance[:, alive]).ravel())
    above = len(far) - np.searchsorted(far, np.abs(d) * (1 - 1e-12))
    return np.where(alive, (1 + above) / (1 + len(far)), 1.0)


def _adjusted(p: np.ndarray, alive: np.ndarray) -> Tensor:
    """Return p-values after Benjamini and Hochberg, over the latents that are active somewhere."""
    q = torch.ones(len(p))
    q[torch.from_numpy(alive)] = false_discovery(torch.from_numpy(p[alive]))
    return q


def _names(first: FeatureStore, second: FeatureStore, name: str) -> list[str]:
    """Return the numbers of latents, with their labels where one of the stores has them."""
    said = {x.latent: x.text for s in (second, first) for x in s.meta.labels(name)}
    return [f"{i}: {said[i]}" if i in said else f"{i}" for i in range(len(first.latents(name)))]
