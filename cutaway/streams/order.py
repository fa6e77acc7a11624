"""Random order from a seed and a place: the same wherever it is drawn, whatever was drawn before."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.core.stats import generator


def drawn(seed: int, *place: str | int) -> torch.Generator:
    """Return a random source of its own for one place of one seed."""
    digest = hashlib.sha256("\x00".join(map(str, (seed, *place))).encode()).digest()
    return generator(int.from_bytes(digest[:8], "little") >> 1)


def permutation(n: int, seed: int, *place: str | int) -> Int[Tensor, "n"]:
    """Return a uniformly random order of n things."""
    return torch.randperm(n, generator=drawn(seed, *place))
