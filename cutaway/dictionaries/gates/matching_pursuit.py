"""Matching pursuit: a greedy search with the decoder's rows, without encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.gates.shared.gate import GreedyGate
from cutaway.dictionaries.gates.shared.train_gate import (
    Chosen,
    Own,
    TrainGate,
    fixed_pairs,
    pairs_of,
)
from cutaway.dictionaries.kernels import topk as select
from cutaway.dictionaries.kernels.topk import Encoder
from cutaway.dictionaries.objectives.active import Active


@dataclass(frozen=True, eq=False)
class MatchingPursuit(GreedyGate):
    """Greedy: take the decoder row that explains most of what is left, subtract it, and go on.

    It has no encoder. Each step adds max_i ⟨residual, W_d,i⟩ (at least 0) to its latent, for at most `steps` steps
    (None: no limit) and until a token's residual norm is below `residual` or, with `stop_on_repeat`, a step adds no new
    latent. (Costa et al. 2025, arXiv:2506.03093.)
    """

    residual: float = 1e-2
    steps: int | None = None
    stop_on_repeat: bool = True

    def pursue(self, x: Float[Tensor, "token width"], decoder: Float[Tensor, "latent width"]) -> SparseCode:
        """Return the code of inputs from which the bias has been subtracted.

        Raises:
            Refused: neither a limit of steps nor a stop at repeats, so that it might never end.
        """
        if self.steps is None and not self.stop_on_repeat:
            raise Refused("MatchingPursuit", "nothing bounds its steps", "give steps=, or stop_on_repeat=True")
        code = x.new_zeros(len(x), len(decoder))
        rest, live = x, torch.ones(len(x), dtype=torch.bool, device=x.device)
        step = 0
        while bool(live.any()) and (self.steps is None or step < self.steps):
            value, index = (rest @ decoder.T).relu().max(1)
            value = value * live
            new = (code.gather(1, index[:, None])[:, 0] == 0) & (value != 0)
            code = code.scatter_add(1, index[:, None], value[:, None])
            rest = rest - value[:, None] * decoder[index]
            live = live & ~(rest.norm(dim=1) < self.residual)
            if self.stop_on_repeat:
                live = live & new
            step += 1
        return SparseCode.from_dense(code)


@dataclass(frozen=True)
class TrainMatchingPursuit(TrainGate):
    """Greedy: k times the decoder row that explains most of what is left (Costa et al. 2025, arXiv:2506.03093)."""

    fixed: ClassVar = True
    encodes: ClassVar = False
    k: int

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        rest, index, value = x, [], []
        for _ in range(self.k):
            best, most = select.group_max(rest, encoder, 1)
            rest = torch.addcmul(rest, most, encoder.w[best[:, 0]], value=-1)
            index.append(best)
            value.append(most)
        return fixed_pairs(torch.cat(index, 1), torch.cat(value, 1), len(encoder.w))

    def active(self, pre: Tensor, chosen: Chosen | None, tokens: int, own: Own) -> Active:
        return Active(pre, pre, pairs_of(chosen), tokens)

    def gate(self, own: Own) -> MatchingPursuit:
        return MatchingPursuit(residual=0.0, steps=self.k, stop_on_repeat=False)

    @classmethod
    def like(cls, gate: MatchingPursuit, k: int) -> TrainMatchingPursuit:
        return cls(gate.steps or k)
