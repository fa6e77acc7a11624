"""Sparse codes: which latents are active on each token, and how much.

The common currency of dictionaries: training, harvest, judging, attribution and steering all use it. Two forms of one
thing: a fixed width (top-k gates: `index` and `value` are [token, k], an entry of value 0 is padding) and compressed
rows (`indptr` given: the entries of token t are `indptr[t]` to `indptr[t + 1]`). A code in which a third of the
latents or more are active takes less memory as the dense tensor it came from: it stays that tensor, and makes its rows
when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused

_DENSE = 0.04  # the share of active latents from which a dense product is quicker than gathering rows
_WHOLE = 1 / 3  # the share from which the dense tensor takes less memory than rows: 4 bytes a latent, 12 an active one
_SAMPLE = 16  # tokens whose active latents are counted to tell which of the two is smaller


@dataclass(frozen=True, eq=False)
class SparseCode:
    """Active latents of each token. Values may carry gradients; a value of 0 is an inactive entry."""

    index: Int[Tensor, "token k"] | Int[Tensor, "entry"]
    value: Float[Tensor, "token k"] | Float[Tensor, "entry"]
    n_latents: int
    indptr: Int[Tensor, "tokens_and_end"] | None = field(default_factory=lambda: None)  # not an attribute of the class

    def __post_init__(self) -> None:
        if self.index.shape != self.value.shape or self.index.ndim != (2 if self.indptr is None else 1):
            shapes = f"index {tuple(self.index.shape)} and value {tuple(self.value.shape)} do not belong together"
            raise Refused("sparse code", shapes, "give [token, k] tensors, or [entry] tensors with indptr")

    @classmethod
    def from_dense(cls, f: Float[Tensor, "token latent"]) -> SparseCode:
        """Return the code whose dense form is `f`; gradients flow through its values."""
        some = f.detach()[:: max(1, len(f) // _SAMPLE)]
        if int(some.count_nonzero()) >= _WHOLE * max(1, some.numel()):
            return cls._of_blocks((f,))
        token, latent = f.nonzero(as_tuple=True)
        return cls(latent, f[token, latent], f.shape[1], _pointers(token, len(f)))

    @classmethod
    def _of_blocks(cls, blocks: tuple[Float[Tensor, "_ latent"], ...]) -> SparseCode:
        """Return the code that is kept as dense blocks of tokens."""
        code = object.__new__(cls)
        vars(code).update(blocks=blocks, n_latents=blocks[0].shape[1])
        return code

    @property
    def _blocks(self) -> tuple[Tensor, ...]:
        """The dense blocks of tokens that the code is kept as; empty where it is kept as entries."""
        return vars(self).get("blocks", ())

    def __getattr__(self, name: str) -> Any:
        """Return the entries of a code that is kept as dense blocks; they stay once they are made."""
        if name not in ("index", "value", "indptr") or not self._blocks:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        f = self.dense()
        token, latent = f.nonzero(as_tuple=True)
        vars(self).update(index=latent, value=f[token, latent], indptr=_pointers(token, len(f)))
        return vars(self)[name]

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
        if self._blocks:
            return sum(map(len, self._blocks))
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
        if self._blocks:
            return self._blocks[0] if len(self._blocks) == 1 else torch.cat(self._blocks)
        out = self.value.new_zeros(len(self), self.n_latents)
        token, latent = self.tokens, self.index.reshape(-1)
        twice = self.indptr is None or not bool(((token * self.n_latents + latent).diff() > 0).all())
        return out.index_put((token, latent), self.value.reshape(-1), accumulate=twice)

    def csr(self) -> SparseCode:
        """Return the same code in compressed rows, its latents ascending in each token, without inactive entries."""
        value = self.value.reshape(-1)
        active = value != 0
        return self.of_entries(
            self.tokens[active], self.index.reshape(-1)[active], value[active], (len(self), self.n_latents)
        )

    def counts(self) -> Int[Tensor, "token"]:
        """Return the number of active latents per token (the L0 of that token)."""
        if self._blocks:
            return torch.cat([f.count_nonzero(1) for f in self._blocks])
        out = torch.zeros(len(self), dtype=torch.int64, device=self.index.device)
        return out.index_add(0, self.tokens, (self.value.reshape(-1) != 0).long())

    def fires(self) -> Int[Tensor, "latent"]:
        """Count the tokens on which each latent is active."""
        if self._blocks:
            return torch.stack([f.count_nonzero(0) for f in self._blocks]).sum(0)
        return torch.bincount(self.index.reshape(-1)[self.value.reshape(-1) != 0], minlength=self.n_latents)

    def columns(self, latents: Int[Tensor, "chosen"] | Sequence[int]) -> Float[Tensor, "token chosen"]:
        """Return the values of some latents on every token, as one tensor."""
        if self._blocks:
            return torch.cat([f[:, self._latents(latents)] for f in self._blocks])
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
        if self._blocks:
            return self._of_blocks((self.dense()[tokens],))
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
        if self._blocks:
            return self._of_blocks(tuple(f * factor for f in self._blocks))
        return SparseCode(self.index, self.value * factor[self.index], self.n_latents, self.indptr)

    def times(self, rows: Float[Tensor, "latent width"]) -> Float[Tensor, "token width"]:
        """Return the sum of the latents' rows weighted by their values: what a decoder makes of the code.

        Raises:
            Refused: another number of rows than latents.
        """
        if len(rows) != self.n_latents:
            raise Refused("sparse code", f"{self.n_latents} latents meet {len(rows)} rows", "give one row a latent")
        if self._blocks:
            return torch.cat([f.to(rows.dtype) @ rows for f in self._blocks])
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
        if self._blocks:
            return self._of_blocks(tuple(f.to(device, dtype) for f in self._blocks))
        there = device if device is not None else self.index.device
        ends = None if self.indptr is None else self.indptr.to(there)
        return SparseCode(self.index.to(there), self.value.to(there, dtype), self.n_latents, ends)

    def _latents(self, latents: Tensor | Sequence[int]) -> Int[Tensor, "chosen"]:
        device = self._blocks[0].device if self._blocks else self.index.device
        chosen = torch.as_tensor(latents, dtype=torch.int64, device=device).reshape(-1)
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
    if all(c._blocks for c in codes):
        return SparseCode._of_blocks((torch.cat([c.dense() for c in codes], 1),))
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
    if all(c._blocks for c in codes):
        return SparseCode._of_blocks(tuple(f for c in codes for f in c._blocks))
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
