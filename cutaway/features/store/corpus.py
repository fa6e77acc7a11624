"""The tokens that a store refers to: contexts with the document of each token and what became of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cutaway.features.store.hashes import draw, hash_contexts
from cutaway.features.store.shelf import Columns
from cutaway.streams.batch import Batch

#: what became of a token: it counts, is special or a sink, is held out for scores, and has its code in the store
COUNTED, SPECIAL, SINK, SCORE, CODED = 1, 2, 4, 8, 16
HALVES = ("explain", "score")
_TOKENS = 1 << 17  # of a file


def rows_of(width: int) -> int:
    """Return the number of contexts in a file of the corpus, from the positions of each."""
    return max(1, _TOKENS // width)


def corpus_rows(
    batch: Batch,
    first: int,
    fresh: Bool[Tensor, "row"],
    width: int,
    special: Int[Tensor, "id"],
    fates: Mapping[int, int],
) -> Columns:
    """Return the rows of the corpus that contexts make.

    Args:
        batch: all tokens of the contexts, with a mask.
        first: number of the first context.
        fresh: False for contexts that are left out.
        width: positions of a context.
        special: ids of special tokens.
        fates: SCORE and CODED of each document.
    """
    ids, document, flags = (torch.full((len(fresh), width), n, dtype=torch.int32) for n in (-1, -1, 0))
    at = (batch.context.cpu() - first, batch.position.cpu())
    own, tokens, counted = batch.document.cpu(), batch.ids.cpu(), batch.mask.cpu()
    marked = torch.isin(tokens, special.cpu())
    numbers, which = own.unique(return_inverse=True)
    fate = torch.tensor([fates[n] for n in numbers.tolist()])[which]
    ids[at], document[at] = tokens.int(), own.int()
    flags[at] = (COUNTED * counted + SPECIAL * marked + SINK * (~counted & ~marked) + fate).int()
    number = torch.arange(first, first + len(fresh))
    rows = {"ids": ids, "document": document, "flags": flags.to(torch.uint8), "number": number}
    return {n: t[fresh] for n, t in (rows | {"hash": hash_contexts(ids.long())}).items()}


def fate(document: int, seed: int, score: float, coded: float) -> int:
    """Return SCORE and CODED of a document by its hash: shares of all documents, drawn apart from each other."""
    held_out, kept = draw(document, seed, HALVES[1]) < score, draw(document, seed, "codes") < coded
    return SCORE * held_out + CODED * kept


def counts(rows: Columns) -> dict[str, int]:
    """Return the numbers of contexts and tokens of some rows, by what became of them."""
    flags = rows["flags"]
    real, counted = rows["document"] >= 0, flags & COUNTED > 0
    kinds = {
        "tokens": real,
        "counted": counted,
        "special": flags & SPECIAL > 0,
        "sinks": flags & SINK > 0,
        HALVES[0]: counted & (flags & SCORE == 0),
        HALVES[1]: counted & (flags & SCORE > 0),
        "coded": counted & (flags & CODED > 0),
    }
    return {"contexts": len(flags), "padding": int((~real).sum())} | {n: int(t.sum()) for n, t in kinds.items()}
