"""AbsTopK: the k pre-activations of each token with the largest absolute value are active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.gates.shared.gate import EncoderGate, positive, within
from cutaway.dictionaries.gates.shared.train_gate import (
    Chosen,
    Own,
    TrainGate,
    fixed_pairs,
    pairs_of,
    top_of_shards,
)
from cutaway.dictionaries.kernels import topk as select
from cutaway.dictionaries.kernels.reduce import Across
from cutaway.dictionaries.kernels.topk import Encoder
from cutaway.dictionaries.objectives.active import Active


@dataclass(frozen=True, eq=False)
class AbsTopK(EncoderGate):
    """f = π, its sign kept, on the k largest |π| of each token."""

    sets_number: ClassVar = True
    k: int

    def __post_init__(self) -> None:
        positive(self, self.k)

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        index = pre.abs().topk(within(self, self.k, pre), dim=1, sorted=False).indices
        return SparseCode(index, pre.gather(1, index), pre.shape[1])


@dataclass(frozen=True)
class TrainAbsTopK(TrainGate):
    """The k largest in absolute value, signs kept."""

    fixed: ClassVar = True
    k: int

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        index, value = select.top_k(x, encoder, self.k, signed=True)
        return fixed_pairs(index, value, len(encoder.w))

    def choose_shard(self, x: Tensor, encoder: Encoder, own: Own, across: Across, n_latents: int) -> Chosen:
        return top_of_shards(x, encoder, self.k, True, across)

    def active(self, pre: Tensor, chosen: Chosen | None, tokens: int, own: Own) -> Active:
        return Active(pre, pre, pairs_of(chosen), tokens)

    def gate(self, own: Own) -> AbsTopK:
        return AbsTopK(self.k)

    @classmethod
    def like(cls, gate: AbsTopK, k: int) -> TrainAbsTopK:
        return cls(gate.k)
