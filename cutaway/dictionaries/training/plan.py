"""Plans: how long and how exactly to train. Plain data, the same for all dictionaries of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from cutaway.core.refuse import Refused

Select = Literal["auto", "float32", "bfloat16"]
Products = Literal["auto", "plain", "onednn"]

TRIED = (1.0, 1 / 3, 3.0)  # learning rates of the probe, times the customary one
SILENT = 10_000_000  # tokens


@dataclass(frozen=True)
class Plan:
    """How long and how exactly to train.

    Args:
        tokens: budget; the last batch may go a little over it.
        warmup: share of the run over which the learning rate rises, at most 1000 steps.
        decay: share of the run, at its end, over which the rate falls to zero.
        probe: share of the run on which learning rates are tried side by side where a recipe names none.
        select: in what candidates of top-k gates are found; "auto" measures whether bfloat16 is right and quicker.
        products: how float32 products are computed (see `precision`); "auto" measures. A measurement can come out
            either way on a busy machine, so two runs have the same bits for certain only if both are named.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints.
        checkpoint_seconds: time after which there is one in any case.
        card_tokens: tokens of the stream, after those trained on, on which the card is made.
    """

    tokens: int
    warmup: float = 0.01
    decay: float = 0.2
    probe: float = 0.02
    select: Select = "auto"
    products: Products = "auto"
    log_every: int = 20
    checkpoint_every: int = 500
    checkpoint_seconds: float = 60.0
    card_tokens: int = 16384

    def __post_init__(self) -> None:
        shares = {"warmup": self.warmup, "decay": self.decay, "probe": self.probe}
        wrong = [f"{n}={v}" for n, v in shares.items() if not 0 <= v < 1]
        if self.tokens < 1 or self.log_every < 1 or self.checkpoint_every < 1:
            wrong.append(f"tokens={self.tokens}, every={self.log_every}, {self.checkpoint_every}")
        if not self.checkpoint_seconds > 0:
            wrong.append(f"checkpoint_seconds={self.checkpoint_seconds}")
        if wrong:
            raise Refused(
                f"a plan with {', '.join(wrong)}", "numbers count from 1, shares from 0 to below 1", "change them"
            )

    def steps(self, batch: int) -> int:
        """Steps of the whole run, with batches of so many tokens."""
        return max(1, -(-self.tokens // batch))

    def factor(self, step: int, steps: int) -> float:
        """The learning rate at a step, as a share of the highest."""
        rise = max(1, min(1000, round(self.warmup * steps)))
        fall = self.decay * steps
        return min(1.0, (step + 1) / rise, (steps - step) / fall if fall >= 1 else 1.0)

    def probing(self, steps: int) -> int:
        """Steps on which learning rates are tried: the share, at least 50, at most a quarter of the run."""
        return min(max(50, round(self.probe * steps)), max(1, steps // 4)) if self.probe else 0

    def silent_after(self) -> int:
        """Tokens after which a latent counts as silent: ten million, or a twentieth of the run."""
        return max(1, min(SILENT, self.tokens // 20))

    def as_dict(self) -> dict[str, Any]:
        """The plan ready for JSON."""
        return asdict(self)
