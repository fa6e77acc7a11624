"""Sparse codes: which latents are active on each token, and how much.

The common currency of dictionaries: training, harvest, judging, attribution and steering all use it. Two forms of one
thing: a fixed width (top-k gates: `index` and `value` are [token, k], an entry of value 0 is padding) and compressed
rows (`indptr` given: the entries of token t are `indptr[t]` to `indptr[t + 1]`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused

_DENSE = 0.04  # the share of active latents from which a dense product is quicker than gathering rows


@dataclass(frozen=True, eq=False)
class SparseCode:
    """Active latents of each token. Values may carry gradients; a value of 0 is an inactive entry."""

    index: Int[Tensor, "token k"] | Int[Tensor, "entry"]
    value: Float[Tensor, "token k"] | Float[Tensor, "entry"]
    n_latents: int
    indptr: Int[Tensor, "tokens_and_end"] | None = None

    def __post_init__(self) -> None:
        if self.index.shape != self.value.shape or self.index.ndim != (2 if self.indptr is None else 1):
            shapes = f"index {tuple(self.index.shape)} and value {tuple(self.value.shape)} do not belong together"
            raise Refused("sparse code", shapes, "give [token, k] tensors, or [entry] tensors with indptr")

    @classmethod
    def from_dense(cls, f: Float[Tensor, "token latent"]) -> SparseCode:
        """Return the code whose dense form is `f`; gradients flow through its values."""
        token, latent = f.nonzero(as_tuple=True)
        return cls(latent, f[token, latent], f.shape[1], _pointers(token, len(f)))

    @classmethod
    def of_entries(
        cls,
        token: Int[Tensor, "entry"],
        latent: Int[Tensor, "entry"],
        value: Float[Tensor, "entry"],
        shape: tuple[int, int],
    ) -> SparseCode:
        """Return the code of single entries in any order; `shape` is (tokens, latents)."""
        order = torch.argsort(token * shape[1] + latent, stable=True)
        return cls(latent[order], value[order], shape[1], _pointers(token[order], shape[0]))

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.index) if self.indptr is None else len(self.indptr) - 1

    @property
    def tokens(self) -> Int[Tensor, "entry"]:
        """The token of every entry, in the order of the flattened index."""
        every = torch.arange(len(self), device=self.index.device)
        if self.indptr is None:
            return every.repeat_interleave(self.index.shape[1])
        return every.repeat_interleave(self.indptr.diff(), output_size=len(self.index))

    def dense(self) -> Float[Tensor, "token latent"]:
        """Return the whole code as one tensor."""
        out = self.value.new_zeros(len(self), self.n_latents)
        return out.index_put((self.tokens, self.index.reshape(-1)), self.value.reshape(-1), accumulate=True)

    def csr(self) -> SparseCode:
        """Return the same code in compressed rows, its latents ascending in each token, without inactive entries."""
        value = self.value.reshape(-1)
        active = value != 0
        return self.of_entries(
            self.tokens[active], self.index.reshape(-1)[active], value[active], (len(self), self.n_latents)
        )

    def counts(self) -> Int[Tensor, "token"]:
        """Return the number of active latents per token (the L0 of that token)."""
        out = torch.zeros(len(self), dtype=torch.int64, device=self.index.device)
        return out.index_add(0, self.tokens, (self.value.reshape(-1) != 0).long())

    def fires(self) -> Int[Tensor, "latent"]:
        """Count the tokens on which each latent is active."""
        return torch.bincount(self.index.reshape(-1)[self.value.reshape(-1) != 0], minlength=self.n_latents)

    def columns(self, latents: Int[Tensor, "chosen"] | Sequence[int]) -> Float[Tensor, "token chosen"]:
        """Return the values of some latents on every token, as one tensor."""
        return self.select(latents).dense()

    def select(self, latents: Int[Tensor, "chosen"] | Sequence[int]) -> SparseCode:
        """Return the code of some latents only, renumbered in the order given.

        Raises:
            Refused: a latent outside the code, or named twice.
        """
        chosen = self._latents(latents)
        place = torch.full((self.n_latents,), -1, device=chosen.device)
        place[chosen] = torch.arange(len(chosen), device=chosen.device)
        new = place[self.index.reshape(-1)]
        kept = new >= 0
        return self.of_entries(self.tokens[kept], new[kept], self.value.reshape(-1)[kept], (len(self), len(chosen)))

    def put(self, latents: Int[Tensor, "chosen"] | Sequence[int], values: Float[Tensor, "token chosen"]) -> SparseCode:
        """Return the code with the values of some latents replaced on every token."""
        chosen = self._latents(latents)
        away = torch.zeros(self.n_latents, dtype=torch.bool, device=chosen.device)
        away[chosen] = True
        index, value, kept = self.index.reshape(-1), self.value.reshape(-1), ~away[self.index.reshape(-1)]
        token, column = values.nonzero(as_tuple=True)
        return self.of_entries(
            torch.cat([self.tokens[kept], token]),
            torch.cat([index[kept], chosen[column]]),
            torch.cat([value[kept], values[token, column].to(value.dtype)]),
            (len(self), self.n_latents),
        )

    def rows(self, tokens: Tensor | Sequence[int] | slice) -> SparseCode:
        """Return the code of some tokens: indices, a mask or a slice."""
        chosen = torch.arange(len(self), device=self.index.device)[tokens]
        if self.indptr is None:
            return SparseCode(self.index[chosen], self.value[chosen], self.n_latents)
        counts = self.indptr.diff()[chosen]
        ends = counts.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        start = (self.indptr[chosen] - (ends - counts)).repeat_interleave(counts, output_size=total)
        entry = start + torch.arange(total, device=self.index.device)
        return SparseCode(self.index[entry], self.value[entry], self.n_latents, F.pad(ends, (1, 0)))

    def scaled(self, factor: Float[Tensor, "latent"]) -> SparseCode:
        """Return the code with the values of every latent multiplied by its own factor."""
        return SparseCode(self.index, self.value * factor[self.index], self.n_latents, self.indptr)

    def times(self, rows: Float[Tensor, "latent width"]) -> Float[Tensor, "token width"]:
        """Return the sum of the latents' rows weighted by their values: what a decoder makes of the code.

        Raises:
            Refused: another number of rows than latents.
        """
        if len(rows) != self.n_latents:
            raise Refused("sparse code", f"{self.n_latents} latents meet {len(rows)} rows", "give one row a latent")
        value = self.value.to(rows.dtype)
        if self.index.numel() == 0:
            return rows.new_zeros(len(self), rows.shape[1]) + 0 * rows.sum(0)
        if self.index.numel() > _DENSE * len(self) * self.n_latents:
            code = SparseCode(self.index, value, self.n_latents, self.indptr)
            return code.dense() @ rows
        if self.indptr is None:
            return F.embedding_bag(self.index, rows, mode="sum", per_sample_weights=value)
        return F.embedding_bag(
            self.index, rows, self.indptr, mode="sum", per_sample_weights=value, include_last_offset=True
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SparseCode:
        """Return the same code on another device, its values in another dtype."""
        there = device if device is not None else self.index.device
        ends = None if self.indptr is None else self.indptr.to(there)
        return SparseCode(self.index.to(there), self.value.to(there, dtype), self.n_latents, ends)

    def _latents(self, latents: Tensor | Sequence[int]) -> Int[Tensor, "chosen"]:
        chosen = torch.as_tensor(latents, dtype=torch.int64, device=self.index.device).reshape(-1)
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.n_latents:
            worst = int(chosen.max()) if int(chosen.max()) >= self.n_latents else int(chosen.min())
            raise Refused(f"latent {worst}", "the code has no such latent", f"use 0 to {self.n_latents - 1}")
        if len(chosen.unique()) != len(chosen):
            raise Refused(f"latents {chosen.tolist()}", "one is named twice", "name each once")
        return chosen


def concat_latents(codes: Sequence[SparseCode]) -> SparseCode:
    """Return the codes of the same tokens as one code: the latents of the first, then those of the second, …

    Raises:
        Refused: codes of different numbers of tokens, or none.
    """
    _some(codes)
    if len(codes) == 1:
        return codes[0]
    if len({len(c) for c in codes}) > 1:
        raise Refused("codes side by side", f"they have {[len(c) for c in codes]} tokens", "encode the same tokens")
    starts = list(accumulate((c.n_latents for c in codes), initial=0))
    index = [c.index + start for c, start in zip(codes, starts, strict=False)]
    if all(c.indptr is None for c in codes):
        return SparseCode(torch.cat(index, 1), torch.cat([c.value for c in codes], 1), starts[-1])
    return SparseCode.of_entries(
        torch.cat([c.tokens for c in codes]),
        torch.cat([i.reshape(-1) for i in index]),
        torch.cat([c.value.reshape(-1) for c in codes]),
        (len(codes[0]), starts[-1]),
    )


def concat_tokens(codes: Sequence[SparseCode]) -> SparseCode:
    """Return the codes of the same latents as one code: the tokens of the first, then those of the second, …

    Raises:
        Refused: codes of different numbers of latents, or none.
    """
    _some(codes)
    if len(codes) == 1:
        return codes[0]
    if len({c.n_latents for c in codes}) > 1:
        raise Refused("codes joined", f"they have {[c.n_latents for c in codes]} latents", "use one dictionary")
    n = codes[0].n_latents
    if all(c.indptr is None for c in codes) and len({c.index.shape[1] for c in codes}) == 1:
        return SparseCode(torch.cat([c.index for c in codes]), torch.cat([c.value for c in codes]), n)
    rows = [c if c.indptr is not None else c.csr() for c in codes]
    counts = torch.cat([c.indptr.diff() for c in rows if c.indptr is not None])
    return SparseCode(
        torch.cat([c.index for c in rows]), torch.cat([c.value for c in rows]), n, F.pad(counts.cumsum(0), (1, 0))
    )


def _some(codes: Sequence[SparseCode]) -> None:
    if not codes:
        raise Refused("joined codes", "there are none", "give at least one")


def _pointers(token: Int[Tensor, "entry"], n: int) -> Int[Tensor, "tokens_and_end"]:
    return F.pad(torch.bincount(token, minlength=n).cumsum(0), (1, 0))
