"""ReLU: every positive pre-activation is active; a penalty makes the code sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.gates.shared.gate import EncoderGate
from cutaway.dictionaries.gates.shared.train_gate import (
    Chosen,
    Flags,
    Own,
    TrainGate,
    positive_values,
)
from cutaway.dictionaries.kernels import topk as select
from cutaway.dictionaries.kernels.topk import Encoder
from cutaway.dictionaries.objectives import L1, Tanh, Term
from cutaway.dictionaries.objectives.active import Active


@dataclass(frozen=True, eq=False)
class Relu(EncoderGate):
    """f = max(π, 0) (Bricken et al. 2023)."""

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        return SparseCode.from_dense(pre.relu())

    def take(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        return SparseCode.from_dense(pre.relu_())


@dataclass(frozen=True)
class TrainRelu(TrainGate):
    """Every positive pre-activation; a penalty makes it sparse."""

    flags: ClassVar = ("penalty", "penalty_kind")
    penalties: ClassVar = ("tanh",)

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {"threshold"}

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        return Chosen(*select.above(x, encoder, 0.0))

    def active(self, pre: Tensor, chosen: Chosen | None, tokens: int, own: Own) -> Active:
        return positive_values(pre, chosen, tokens)

    def gate(self, own: Own) -> Relu:
        return Relu()

    def customary(self) -> tuple[Term, ...]:
        return (L1(5.0),)

    @classmethod
    def of_flags(cls, flags: Flags) -> tuple[TrainGate, tuple[Term, ...]]:
        weight = flags.weight(5.0)
        return cls(), (L1(weight) if flags.penalty_kind is None else Tanh(weight),)
