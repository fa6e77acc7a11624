"""TopK: the k largest pre-activations of each token are active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.gates.shared.gate import EncoderGate, positive, within
from cutaway.dictionaries.gates.shared.train_gate import (
    Chosen,
    Flags,
    Own,
    TrainGate,
    fixed_pairs,
    pairs_of,
    ranked,
    top_of_shards,
)
from cutaway.dictionaries.kernels import topk as select
from cutaway.dictionaries.kernels.reduce import Across
from cutaway.dictionaries.kernels.sparse import Pairs
from cutaway.dictionaries.kernels.topk import Encoder
from cutaway.dictionaries.objectives import AuxK, MultiTopK, Term
from cutaway.dictionaries.objectives.active import Active


@dataclass(frozen=True, eq=False)
class TopK(EncoderGate):
    """f = max(π, 0) on the k largest π of each token (Gao et al. 2024, arXiv:2406.04093).

    `multi` tells training to add the loss of the 4 k largest, weighted 1/8; the code is the same. With `signed`, f = π:
    negative values pass where fewer than k are positive.
    """

    sets_number: ClassVar = True
    k: int
    multi: bool = False
    signed: bool = False

    def __post_init__(self) -> None:
        positive(self, self.k)

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        value, index = pre.topk(within(self, self.k, pre), dim=1, sorted=False)
        return SparseCode(index, value if self.signed else value.relu(), pre.shape[1])


@dataclass(frozen=True)
class TrainTopK(TrainGate):
    """The k largest of each token; with `wide`, that many are decoded a second time for the loss of Multi-TopK."""

    fixed: ClassVar = True
    flags: ClassVar = ("k", "wide")
    k: int
    wide: int = 0

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | ({"wide"} if self.wide > self.k else set())

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        index, value = select.top_k(x, encoder, min(max(self.k, self.wide), len(encoder.w)))
        return fixed_pairs(index, value, len(encoder.w))

    def choose_shard(self, x: Tensor, encoder: Encoder, own: Own, across: Across, n_latents: int) -> Chosen:
        if self.wide <= self.k:
            return top_of_shards(x, encoder, self.k, False, across)
        n = len(encoder.w)
        index, value = select.top_k(x, encoder, min(self.wide, n))  # [token, wide]
        scores = ranked(index, value, encoder)
        best = scores.topk(self.k, dim=1)
        inner = torch.zeros_like(value).scatter_(1, best.indices, across.largest(best.values, self.k))
        value = value * across.largest(scores, self.wide)
        return Chosen(Pairs.fixed(index, n), value.reshape(-1), inner.reshape(-1))

    def active(self, pre: Tensor, chosen: Chosen | None, tokens: int, own: Own) -> Active:
        value, pairs = pre.relu(), pairs_of(chosen)
        if self.wide <= self.k:
            return Active(pre, value, pairs, tokens)
        inner = None if chosen is None else chosen.inner
        if inner is None:
            rows = pre.detach().view(tokens, -1)
            inner = torch.zeros_like(rows).scatter_(1, rows.topk(self.k, sorted=False).indices, 1.0).view_as(pre)
        return Active(pre, value * inner, pairs, tokens, {"wide": value})

    def gate(self, own: Own) -> TopK:
        return TopK(self.k, multi=self.wide > self.k)

    def customary(self) -> tuple[Term, ...]:
        return (AuxK(), MultiTopK()) if self.wide > self.k else (AuxK(),)

    @classmethod
    def like(cls, gate: TopK, k: int) -> TrainTopK:
        return cls(gate.k)

    @classmethod
    def of_flags(cls, flags: Flags) -> tuple[TrainGate, tuple[Term, ...]]:
        gate = cls(flags.k, flags.wide or 0)
        return gate, gate.customary()
