"""Hard concrete gates: numbers in [0, 1] that are 0 or 1 with probability above 0, and differentiable in between.

Louizos et al. 2018 (arXiv:1712.01312): s = σ((log u − log(1 − u) + log α) / T), u uniform in (0, 1), stretched to
[−0.1, 1.1] and clipped; T = 2/3. A gate is open (above 0) with probability σ(log α − T log(0.1 / 1.1)).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3
_MOST = math.log(100.0)  # log α stays within ± this, so that a gate can still turn
_EDGE = 1e-6  # u stays this far from 0 and 1
START = math.log((0.9 - _LOW) / (_HIGH - 0.9))  # log α of gates whose middle value is 0.9


def draw(log_alpha: Float[Tensor, "gate"], chance: torch.Generator) -> Float[Tensor, "gate"]:
    """Draw the gates, with their gradient."""
    u = torch.rand(log_alpha.shape, generator=chance).clamp(_EDGE, 1 - _EDGE)
    s = ((u.log() - (1 - u).log() + log_alpha) / _TEMPERATURE).sigmoid()
    return (s * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def openness(log_alpha: Float[Tensor, "gate"]) -> Float[Tensor, "gate"]:
    """Return the probability that each gate is open."""
    return (log_alpha - _TEMPERATURE * math.log(-_LOW / _HIGH)).sigmoid()


def with_embeddings(gates: Float[Tensor, "gate"]) -> Float[Tensor, "writer"]:
    """Return the gates of all writers: the embeddings, which come first, are always open."""
    return torch.cat([gates.new_ones(1), gates])


@torch.no_grad()
def settle(log_alpha: Float[Tensor, "gate"]) -> None:
    """Keep log α in its range."""
    log_alpha.clamp_(-_MOST, _MOST)
