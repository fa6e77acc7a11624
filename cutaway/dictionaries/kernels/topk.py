"""Selection: the encoder product and the choice of the active latents, without ever holding all pre-activations.

Rows of tokens go through the encoder in chunks that fit the cache, and of each chunk only the chosen entries stay.
The choice is exact. On a processor `largest` finds a floor under the k-th largest entry of a row from the maxima of
groups of latents (k groups hold an entry ≥ the k-th largest group maximum, so k entries are ≥ it), compares once, and
sorts out the few that are left; where that does not fit, `torch.topk` does the same.

With a `Shadow` (the encoder in bfloat16) candidates come from a bfloat16 product, with k + 8 of them a token, and their
float32 values decide. `precision.py` measures whether that is both right and quicker on this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.dictionaries.kernels.reduce import ALONE, Across
from cutaway.dictionaries.kernels.sparse import Pairs, dots

CHUNK = 256  # tokens, on a processor: 256 × 16384 float32 pre-activations are 16 MiB
PRODUCT = 24 << 20  # bytes of the chunks that one product fills; a library packs the encoder once per product
SPARE = 8  # candidates a token beyond k, for the rounding of bfloat16
_CROWDED = 8  # times as many entries above the floor as wanted: ties, better left to torch.topk


@dataclass(frozen=True, eq=False)
class Encoder:
    """Input of the selection: π = w (x − p) + b, times `scale` where latents are compared in units of their own."""

    w: Float[Tensor, "latent d"]
    b: Float[Tensor, "latent"]
    scale: Float[Tensor, "latent"] | None = None
    shadow: Shadow | None = None


@dataclass(frozen=True, eq=False)
class Shadow:
    """The scaled encoder in bfloat16, its bias in two more columns (high and low part)."""

    rows: Tensor

    @staticmethod
    def of(w: Float[Tensor, "latent d"], b: Float[Tensor, "latent"], scale: Tensor | None = None) -> Shadow:
        """Return the shadow of an encoder."""
        shadow = Shadow(torch.empty(w.shape[0], w.shape[1] + 2, dtype=torch.bfloat16, device=w.device))
        shadow.refresh(w, b, scale)
        return shadow

    def refresh(self, w: Float[Tensor, "latent d"], b: Float[Tensor, "latent"], scale: Tensor | None = None) -> None:
        """Take over weights that have changed."""
        if scale is not None:
            w, b = w * scale[:, None], b * scale
        self.rows[:, :-2].copy_(w)
        self.rows[:, -2].copy_(b)
        self.rows[:, -1].copy_(b - self.rows[:, -2].float())


def top_k(
    x: Float[Tensor, "token d"], encoder: Encoder, k: int, signed: bool = False
) -> tuple[Int[Tensor, "token k"], Float[Tensor, "token k"]]:
    """Return the k largest positive pre-activations of every token; where there are fewer, the rest has value 0.

    With `signed`, those largest in absolute value, with their sign. Values are never multiplied by `encoder.scale`.
    """
    wanted = k if encoder.shadow is None else min(k + SPARE, len(encoder.w))
    parts = [largest(chunk, wanted, signed) for chunk in _chunks(x, encoder)]
    index = torch.cat([i for i, _ in parts])
    value = torch.cat([v for _, v in parts])
    if encoder.shadow is None:
        return index, _unscaled(value, index, encoder)
    # A padding entry names latent 0, which may be a candidate itself: only what was a candidate keeps its value.
    exact = dots(x, encoder.w, Pairs.fixed(index, len(encoder.w))).view_as(value) + encoder.b[index]
    exact = torch.where(value == 0, 0, exact if signed else exact.relu())
    ranked = exact if encoder.scale is None else exact * encoder.scale[index]
    best = (ranked.abs() if signed else ranked).topk(k, sorted=False).indices
    return index.gather(1, best), exact.gather(1, best)


def batch_top_k(
    x: Float[Tensor, "token d"], encoder: Encoder, n: int, hint: float = 0.0, across: Across = ALONE
) -> tuple[Pairs, Float[Tensor, "entry"], float]:
    """Return the n largest positive pre-activations of the whole batch, their values, and the smallest one chosen.

    Entries above a floor are collected and the n-th largest among them decides, which is exact if there are n. The
    floor comes from a few tokens, or is the `hint` (three quarters of an earlier answer is a good one); it is lowered
    until enough is found. With `across`, the batch and the latents are those of all processes, n is this one's share
    of the number, and only the pairs of its own tokens and latents are answered.
    """
    wanted = n if encoder.shadow is None else n + SPARE * len(x)
    floor = hint if hint > 0 else across.highest(_sampled_floor(x, encoder, wanted))
    while True:
        found, score = _above(x, encoder, floor)
        if across.enough(len(score), wanted) or floor <= 0:
            break
        floor = floor / 2 if floor > 1e-6 else 0.0
    keep = across.largest_of_all(score, wanted)
    pairs, value = take_entries(found, keep), score[keep]
    if encoder.shadow is not None:
        value = dots(x, encoder.w, pairs) + encoder.b[pairs.index]
        score = value if encoder.scale is None else value * encoder.scale[pairs.index]
        keep = across.largest_of_all(score, n)
        keep = keep[score[keep] > 0]
        pairs, value = take_entries(pairs, keep), value[keep]
    else:
        value = _unscaled(value, pairs.index, encoder)
    ranked = value if encoder.scale is None else value * encoder.scale[pairs.index]
    return pairs, value, float(ranked.min()) if len(ranked) else 0.0


def above(
    x: Float[Tensor, "token d"], encoder: Encoder, floor: Float[Tensor, "latent"] | float
) -> tuple[Pairs, Float[Tensor, "entry"]]:
    """Return every pre-activation greater than the floor of its latent, in float32, and its value.

    The floor is compared with the scaled pre-activation; the value is not scaled.
    """
    pairs, score = _above(x, Encoder(encoder.w, encoder.b, encoder.scale), floor)
    return pairs, _unscaled(score, pairs.index, encoder)


def group_max(
    x: Float[Tensor, "token d"], encoder: Encoder, groups: int
) -> tuple[Int[Tensor, "token group"], Float[Tensor, "token group"]]:
    """Return the largest pre-activation of each of equal groups of neighbouring latents, at least 0."""
    parts = [chunk.unflatten(1, (groups, -1)).max(-1) for chunk in _chunks(x, Encoder(encoder.w, encoder.b))]
    width = len(encoder.w) // groups
    index = torch.cat([p.indices for p in parts]) + torch.arange(groups, device=x.device) * width
    return index, torch.cat([p.values for p in parts]).relu()


def largest(
    scores: Float[Tensor, "token latent"], k: int, signed: bool = False
) -> tuple[Int[Tensor, "token k"], Float[Tensor, "token k"]]:
    """Return the k largest positive entries of each row (with `signed`, by absolute value), padded with zeros."""
    ranked = scores.abs() if signed else scores
    index = _staged(ranked, k) if ranked.device.type == "cpu" and ranked.dtype in _BITS else None
    if index is None:
        index = ranked.topk(k, dim=1, sorted=False).indices
    value = torch.where(index < 0, 0, scores.gather(1, index.clamp(min=0)))
    return index.clamp(min=0), (value if signed else value.relu()).float()


def take_entries(pairs: Pairs, entries: Int[Tensor, "kept"]) -> Pairs:
    """Return some of the pairs, given by ascending position."""
    counts = torch.bincount(pairs.token[entries], minlength=len(pairs))
    return Pairs(pairs.index[entries], _ends(counts), pairs.n_latents)


# Positive floats have the order of their bits, and a processor compares integers of 16 bits far quicker than bfloat16.
_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.int16}


def _staged(ranked: Tensor, k: int) -> Tensor | None:
    """Return the positions of the k largest entries of each row, -1 where fewer are positive; None where a sort is
    better.
    """
    n, width = ranked.shape
    groups = max(64, 1 << (4 * k - 1).bit_length())
    if groups * 4 > width or k > groups // 2:
        return None
    bits = ranked.view(_BITS[ranked.dtype])
    tops = bits[:, : width // groups * groups].unflatten(1, (-1, groups)).amax(1)
    floor = tops.topk(k, dim=1).values[:, -1:].clamp(min=_least(bits))
    found = np.flatnonzero(np.greater_equal(bits.numpy(), floor.numpy()))
    if len(found) > _CROWDED * n * k:
        return None
    flat = torch.from_numpy(found)
    row = torch.div(flat, width, rounding_mode="floor")
    counts = torch.bincount(row, minlength=n)
    most = max(int(counts.max()), k)
    place = torch.arange(len(flat)) - (counts.cumsum(0) - counts)[row] + row * most
    score = torch.full((n, most), -1, dtype=bits.dtype)
    score.view(-1)[place] = bits.reshape(-1)[flat]
    index = torch.full((n, most), -1)
    index.view(-1)[place] = flat - row * width
    return index.gather(1, score.topk(k, dim=1, sorted=False).indices)


def _least(bits: Tensor) -> float | int:
    """Return the smallest positive number, so that what is not positive is never found."""
    return 1 if bits.dtype == torch.int16 else torch.finfo(torch.float32).tiny


def _chunks(x: Tensor, encoder: Encoder) -> Iterator[Tensor]:
    """Scaled pre-activations of a few tokens at a time, in one buffer that is used again."""
    if encoder.shadow is not None:
        rows = encoder.shadow.rows
        x = torch.cat([x.to(rows.dtype), x.new_ones(len(x), 2).to(rows.dtype)], 1)
    else:
        rows = encoder.w
    chunk = CHUNK if x.device.type == "cpu" else 16 * CHUNK
    together = chunk * max(1, PRODUCT // (chunk * len(rows) * rows.element_size()))
    buffer = torch.empty(min(together, len(x)), len(rows), dtype=rows.dtype, device=x.device)
    for part in x.split(together):
        for out in torch.mm(part, rows.T, out=buffer[: len(part)]).split(chunk):
            if encoder.shadow is None:
                out.add_(encoder.b)
                if encoder.scale is not None:
                    out.mul_(encoder.scale)
            yield out


def _above(x: Tensor, encoder: Encoder, floor: Tensor | float) -> tuple[Pairs, Tensor]:
    """Return the pairs with a scaled pre-activation above the floor, in the order of tokens, and their values."""
    index, counts, values = [], [], []
    for chunk in _chunks(x, encoder):
        flat = _where_greater(chunk, floor)
        row = torch.div(flat, chunk.shape[1], rounding_mode="floor")
        counts.append(torch.bincount(row, minlength=len(chunk)))
        index.append(flat - row * chunk.shape[1])
        values.append(chunk.reshape(-1)[flat].float())
    return Pairs(torch.cat(index), _ends(torch.cat(counts)), len(encoder.w)), torch.cat(values)


def _where_greater(chunk: Tensor, floor: Tensor | float) -> Tensor:
    if chunk.device.type == "cpu" and chunk.dtype == torch.float32:
        bound = floor.numpy() if isinstance(floor, Tensor) else np.float32(floor)
        return torch.from_numpy(np.flatnonzero(np.greater(chunk.numpy(), bound)))
    if chunk.device.type == "cpu" and chunk.dtype == torch.bfloat16 and not isinstance(floor, Tensor) and floor >= 0:
        bits = torch.tensor(floor, dtype=torch.bfloat16).view(torch.int16)  # rounded; a floor may be a little off
        return torch.from_numpy(np.flatnonzero(np.greater(chunk.view(torch.int16).numpy(), bits.numpy())))
    return (chunk > floor).reshape(-1).nonzero()[:, 0]


def _sampled_floor(x: Tensor, encoder: Encoder, n: int, tokens: int = 64) -> float:
    """Somewhat less than the value that n · tokens / all entries of a few tokens reach."""
    sample = x[:: max(1, len(x) // tokens)][:tokens]
    scores = torch.cat([c.float().reshape(-1).clone() for c in _chunks(sample, encoder)])
    rank = min(len(scores), max(1, round(n / len(x) * len(sample))))
    return max(0.0, 0.75 * float(scores.topk(rank).values[-1]))


def _unscaled(value: Tensor, index: Tensor, encoder: Encoder) -> Tensor:
    return value if encoder.scale is None else value / encoder.scale[index]


def _ends(counts: Tensor) -> Tensor:
    out = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=out[1:])
    return out
