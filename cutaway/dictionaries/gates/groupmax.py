"""GroupMax: the largest pre-activation of each of k groups of latents is active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.gates.shared.gate import EncoderGate, positive
from cutaway.dictionaries.gates.shared.train_gate import (
    Chosen,
    Own,
    TrainGate,
    fixed_pairs,
    positive_values,
)
from cutaway.dictionaries.kernels import topk as select
from cutaway.dictionaries.kernels.reduce import ALONE, Across
from cutaway.dictionaries.kernels.topk import Encoder
from cutaway.dictionaries.objectives.active import Active


@dataclass(frozen=True, eq=False)
class GroupMax(EncoderGate):
    """f = max(π, 0) on the largest π of each of k groups of neighbouring latents."""

    sets_number: ClassVar = True
    k: int

    def __post_init__(self) -> None:
        positive(self, self.k)

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        n = pre.shape[1]
        if n % self.k:
            raise Refused(f"GroupMax(k={self.k})", f"{n} latents do not fall into {self.k} equal groups", "choose k")
        value, index = pre.unflatten(1, (self.k, -1)).max(-1)
        starts = torch.arange(0, n, n // self.k, device=pre.device)
        return SparseCode(index + starts, value.relu(), n)


@dataclass(frozen=True)
class TrainGroupMax(TrainGate):
    """The largest of each of k groups of neighbours."""

    fixed: ClassVar = True
    k: int

    def check(self, n_latents: int, shard: int | None = None) -> None:
        if n_latents % self.k:
            what = f"{n_latents} latents in {self.k} groups"
            raise Refused(what, "the groups are not equal", "let k divide the latents")
        if shard is not None and shard % (n_latents // self.k):
            what = f"{self.k} groups over shards of {shard} latents"
            raise Refused(what, "a group would be cut", "let shards divide groups")

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        return self.choose_shard(x, encoder, own, ALONE, len(encoder.w))

    def choose_shard(self, x: Tensor, encoder: Encoder, own: Own, across: Across, n_latents: int) -> Chosen:
        index, value = select.group_max(x, encoder, self.k * len(encoder.w) // n_latents)
        return fixed_pairs(index, value, len(encoder.w))

    def active(self, pre: Tensor, chosen: Chosen | None, tokens: int, own: Own) -> Active:
        return positive_values(pre, chosen, tokens)

    def gate(self, own: Own) -> GroupMax:
        return GroupMax(self.k)

    @classmethod
    def like(cls, gate: GroupMax, k: int) -> TrainGroupMax:
        return cls(gate.k)
