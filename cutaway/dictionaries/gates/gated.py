"""Gated: a gate and a magnitude share one direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.gates.shared.gate import EncoderGate
from cutaway.dictionaries.gates.shared.train_gate import (
    Chosen,
    Flags,
    Own,
    TrainGate,
    at_pairs,
    pairs_of,
)
from cutaway.dictionaries.kernels import topk as select
from cutaway.dictionaries.kernels.topk import Encoder
from cutaway.dictionaries.objectives import OpenGate, Term
from cutaway.dictionaries.objectives.active import Active


@dataclass(frozen=True, eq=False)
class Gated(EncoderGate):
    """f = max(exp(r) π + b_mag, 0) where π + b_gate > 0 (Rajamanoharan et al. 2024, arXiv:2404.16014).

    Here π is the shared linear part, W_e (x − p).
    """

    norm_aware: ClassVar = False
    r_mag: Float[Tensor, "latent"]
    b_gate: Float[Tensor, "latent"]
    b_mag: Float[Tensor, "latent"]

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        magnitude = (pre * self.r_mag.exp() + self.b_mag).relu()
        return SparseCode.from_dense(magnitude * (pre + self.b_gate > 0))


@dataclass(frozen=True)
class TrainGated(TrainGate):
    """A gate and a magnitude with one direction: exp(r) π + b_mag where π + b_gate > 0.

    The pairs are those of the open gate; its own loss reads ReLU(π + b_gate), which lives on the same pairs.
    """

    needs: ClassVar = (OpenGate,)
    flags: ClassVar = ("penalty",)

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {"opened"}

    def parameters(self, n: int) -> dict[str, Tensor]:
        return {name: torch.zeros(n) for name in ("r_mag", "b_gate", "b_mag")}

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        return Chosen(*select.above(x, encoder, -own["b_gate"].detach()))

    def active(self, pre: Tensor, chosen: Chosen | None, tokens: int, own: Own) -> Active:
        r, b_gate, b_mag = (at_pairs(own[name], chosen) for name in ("r_mag", "b_gate", "b_mag"))
        opened = (pre + b_gate).relu()
        value = (pre * r.exp() + b_mag).relu() * (opened > 0)
        return Active(pre, value, pairs_of(chosen), tokens, {"opened": opened})

    def gate(self, own: Own) -> Gated:
        return Gated(*(own[n].detach().clone() for n in ("r_mag", "b_gate", "b_mag")))

    def customary(self) -> tuple[Term, ...]:
        return (OpenGate(5.0),)

    @classmethod
    def of_flags(cls, flags: Flags) -> tuple[TrainGate, tuple[Term, ...]]:
        return cls(), (OpenGate(flags.weight(5.0)),)
