"""Objectives that run the model: end-to-end dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cutaway.dictionaries.objectives.term import Pass, Term


@dataclass(frozen=True)
class Spliced(Term):
    """Loss of the model with the reconstruction in the activation's place (Braun et al. 2024, arXiv:2405.12241).

    `score` gets the reconstructions by site, in the sites' units and with gradients, and the stream's batch; it answers
    with a differentiable loss, such as the divergence of the next-token distributions.
    """

    score: Callable[[Mapping[str, Tensor], Any], Tensor]
    weight: float = 1.0
    rise: float = 0.0

    def of(self, p: Pass) -> Tensor:
        return self.score(p.outs, p.batch)

    def as_dict(self) -> dict[str, Any]:
        name = getattr(self.score, "__qualname__", type(self.score).__name__)
        return {"kind": "Spliced", "score": name, "weight": self.weight, "rise": self.rise}
