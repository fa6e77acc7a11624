"""Sums over latents and means over tokens, where several processes share them.

Training formulas say with an `Across` where a number is a sum over all latents, or a mean over all tokens. One process
has them whole (`ALONE`); processes that share a dictionary complete them (`training/mesh.py`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Across:
    """Reductions in a single process, where everything is whole already."""

    def latents(self, part: Tensor) -> Tensor:
        """Return the sum over shards of latents; its gradient reaches every shard as it is."""
        return part

    def tokens(self, mean: Tensor) -> Tensor:
        """Return the mean over all tokens, from the mean over the tokens of each process."""
        return mean

    def number(self, n: int) -> int:
        """Return the sum over shards of a number of latents."""
        return n

    def highest(self, floor: float) -> float:
        """Return the highest of what each process found."""
        return floor

    def least(self, t: Tensor) -> Tensor:
        """Return the elementwise minimum over all processes."""
        return t

    def largest(self, value: Float[Tensor, "token candidate"], k: int) -> Float[Tensor, "token candidate"]:
        """1 for those candidates that are among the k largest of their token over all shards, 0 for others.

        Every shard gives its own k largest, or all if it has fewer; of equals those of the lowest shards win.
        """
        return torch.ones_like(value)

    def enough(self, found: int, wanted: int) -> bool:
        """Return True if all processes together found as many as they want."""
        return found >= wanted

    def largest_of_all(self, score: Float[Tensor, "entry"], n: int) -> Int[Tensor, "kept"]:
        """Ascending positions of those scores that are among the largest of all processes, n from each on average."""
        if len(score) <= n:
            return torch.arange(len(score), device=score.device)
        return score.topk(n, sorted=False).indices.sort().values


ALONE = Across()
