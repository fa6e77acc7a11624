"""Plans: how long to train, how the learning rate goes, and when to log and save. Plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cutaway.core.refuse import Keyword, Refused


@dataclass(frozen=True)
class Plan:
    """Length of a training run, its learning rate, and its pace of logs and checkpoints.

    Args:
        tokens: budget, in tokens (or examples: what a step counts); the last batch may go a little over it.
        warmup: share of the run over which the learning rate rises, at most 1000 steps.
        decay: share of the run, at its end, over which the rate falls to zero.
        log_every: steps between reports in the log.
        checkpoint_every: steps between checkpoints.
        checkpoint_seconds: time after which there is one in any case.
    """

    tokens: int
    warmup: float = 0.01
    decay: float = 0.2
    log_every: int = 20
    checkpoint_every: int = 500
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        wrong: list[str | Keyword] = [Keyword(n, v) for n, v in self.shares().items() if not 0 <= v < 1]
        counts = {n: getattr(self, n) for n in ("tokens", "log_every", "checkpoint_every")}
        wrong += [Keyword(n, v) for n, v in counts.items() if v < 1]
        if not self.checkpoint_seconds > 0:
            wrong.append(f"checkpoint_seconds={self.checkpoint_seconds}")
        if wrong:
            named = [part for k in wrong for part in (", ", k)]
            why = "numbers count from 1, shares from 0 to below 1"
            raise Refused(("a plan with ", *named[1:]), why, "change them")

    def shares(self) -> dict[str, float]:
        """Return the options that are shares of the run."""
        return {"warmup": self.warmup, "decay": self.decay}

    def done(self, tokens: int, seconds: float) -> float:
        """Return the share of the run that is done after some tokens and seconds; the run ends at 1."""
        return tokens / self.tokens

    def steps(self, batch: int) -> int:
        """Return the number of steps of the whole run, with batches of `batch` tokens."""
        return max(1, -(-self.tokens // batch))

    def factor(self, step: int, steps: int) -> float:
        """Return the learning rate at a step, as a share of the highest."""
        rise = max(1, min(1000, round(self.warmup * steps)))
        fall = self.decay * steps
        return min(1.0, (step + 1) / rise, (steps - step) / fall if fall >= 1 else 1.0)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan ready for JSON."""
        return asdict(self)
