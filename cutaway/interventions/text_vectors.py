"""Vectors of texts at many addresses at once: the mean over a text's tokens, and its last token.

Texts run in batches of similar length, no further than the deepest address, and only what is read of a batch is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address, Pattern
from cutaway.core.progress import advance
from cutaway.core.refuse import Keyword, Refused
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.models.watching import in_batches

READINGS = ("mean", "last")
_TOKENS = 1024  # that run together


@dataclass(frozen=True)
class TextVectors:
    """Vectors of texts.

    Attributes:
        vectors: one per reading, address and text.
        addresses: the addresses, in order.
        readings: `mean` is the mean over a text's tokens without the first, whose norm is often huge; `last` is the
            last token.
        tokens: the token ids of each text.
    """

    vectors: Float[Tensor, "reading address text width"]
    addresses: tuple[Address, ...]
    readings: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]


def text_vectors(
    model: Model,
    texts: Sequence[str],
    sites: Pattern | Sequence[Pattern],
    readings: Sequence[str] = READINGS,
    batch: int = _TOKENS,
) -> TextVectors:
    """Read vectors of texts at all addresses that some patterns mean, with one forward per text.

    Raises:
        Refused: an empty text, no such reading, or addresses that have no vectors or vectors of different widths.
    """
    _check(texts, readings)
    places = model.places(sites)
    tokens = model.tokens(texts)
    order = sorted(range(len(tokens)), key=tokens.lengths.tolist().__getitem__)
    found: Tensor | None = None
    done = 0
    for rows in _batches(model, tokens, order, batch):
        part = _read(model, BatchSlice.of(tokens, rows, True).tokens(tokens), places, readings)
        if found is None:
            found = part.new_empty(len(readings), len(places), len(texts), part.shape[-1])
        found[:, :, rows] = part
        done += len(rows)
        advance(done, len(texts))
    assert found is not None
    ids = tuple(tuple(row[real].tolist()) for row, real in zip(tokens.ids.cpu(), tokens.mask.cpu(), strict=True))
    return TextVectors(found, tuple(places), tuple(readings), ids)


def _check(texts: Sequence[str], readings: Sequence[str]) -> None:
    empty = next((i for i, t in enumerate(texts) if not t.strip()), None)
    if empty is not None or not texts:
        why = "there is none" if empty is None else f"text {empty} is empty"
        raise Refused(f"vectors of {len(texts)} texts", why, "give texts with at least a word each")
    if wrong := [r for r in readings if r not in READINGS]:
        raise Refused(Keyword("readings", wrong[0]), "no text is read so", f"use {', '.join(READINGS)}")


def _batches(model: Model, tokens: Tokens, order: list[int], most: int) -> list[list[int]]:
    """Return the rows that run together, of similar length, with at most `most` tokens."""
    sorted_tokens, out = tokens.rows(order), list[list[int]]()
    for apart in in_batches(model, sorted_tokens, len(order)):
        group = list[int]()
        for i in sorted(apart):
            if group and (len(group) + 1) * int(tokens.lengths[order[i]]) > most:
                out.append(group)
                group = []
            group.append(order[i])
        out.append(group)
    return out


def _read(
    model: Model, tokens: Tokens, places: Sequence[Address], readings: Sequence[str]
) -> Float[Tensor, "reading address text width"]:
    """Read the vectors of a batch at all addresses."""
    acts = model.capture(tokens, places, logits=False)
    rows = torch.arange(len(tokens), device=tokens.ids.device)
    inner = tokens.mask.clone()
    inner[rows, tokens.column(0)] &= tokens.lengths == 1
    share = (inner / inner.sum(1, keepdim=True)).unsqueeze(1)
    ways: dict[str, Any] = {
        "mean": lambda x: (share.to(x.device) @ x.float()).squeeze(1),
        "last": lambda x: x[rows.to(x.device), tokens.last.to(x.device)].float(),
    }
    each = [_vectors(acts[str(a)], a) for a in places]
    if len({x.shape[-1] for x in each}) > 1:
        widths = ", ".join(f"{a} {x.shape[-1]}" for a, x in zip(places, each, strict=True))
        raise Refused("vectors of texts", f"the addresses have different widths: {widths}", "read them apart")
    return torch.stack([torch.stack([ways[r](x).cpu() for x in each]) for r in readings])


def _vectors(x: Tensor, a: Address) -> Float[Tensor, "text position width"]:
    if x.ndim != 3 or not a.row.has_position:
        why = f"its activations are {list(x.shape)}, which is not [batch, position, width]"
        raise Refused(Keyword("sites", str(a)), why, "use a site of vectors, such as resid_post")
    return x
