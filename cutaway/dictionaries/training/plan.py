"""Plans: how long and how exactly to train. Plain data, the same for all dictionaries of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cutaway.training import plan as training

Select = Literal["auto", "float32", "bfloat16"]
Products = Literal["auto", "plain", "onednn"]

TRIED = (1.0, 1 / 3, 3.0)  # learning rates of the probe, times the customary one
SILENT = 10_000_000  # tokens


@dataclass(frozen=True)
class Plan(training.Plan):
    """Length and precision of the training of dictionaries.

    Args:
        tokens: budget; the last batch may go a little over it.
        warmup: share of the run over which the learning rate rises, at most 1000 steps.
        decay: share of the run, at its end, over which the rate falls to zero.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints.
        checkpoint_seconds: time after which there is one in any case.
        probe: share of the run on which learning rates are tried side by side where a recipe names none.
        select: precision in which candidates of top-k gates are found; "auto" measures if bfloat16 is right and faster.
        products: how float32 products are computed (see `precision`); "auto" measures. A measurement can come out
            either way on a busy machine, so two runs have the same bits for certain only if both are named.
        card_tokens: tokens of the stream, after those trained on, on which the card is made.
    """

    probe: float = 0.02
    select: Select = "auto"
    products: Products = "auto"
    card_tokens: int = 16384

    def shares(self) -> dict[str, float]:
        """Return the options that are shares of the run."""
        return super().shares() | {"probe": self.probe}

    def probing(self, steps: int) -> int:
        """Return the steps on which learning rates are tried: the share, at least 50, at most a quarter of the run."""
        return min(max(50, round(self.probe * steps)), max(1, steps // 4)) if self.probe else 0

    def silent_after(self) -> int:
        """Return the tokens after which a latent counts as silent: ten million, or a twentieth of the run."""
        return max(1, min(SILENT, self.tokens // 20))
