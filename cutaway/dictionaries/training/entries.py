"""Entries of a run: one dictionary per recipe and learning rate, with its learner, its curve and its running sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cutaway.dictionaries.training.learner import Learner, Report
from cutaway.training.guard import Guard


@dataclass
class Entry:
    """Dictionary in training, one per recipe and learning rate.

    Attributes:
        recipe: number of its recipe.
        rate: its highest learning rate.
        learner: its weights and optimizer.
        guard: count of skipped steps.
        curve: what was logged, without the terms.
        sums: sums of reports since the last line of the log.
        steps: how many reports are in `sums`.
    """

    recipe: int
    rate: float
    learner: Learner
    guard: Guard = field(default_factory=Guard)
    curve: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def add(self, report: Report) -> None:
        """Add a step to the sums of the next line."""
        new = {"loss": report.loss, "error": report.error, "deviation": report.deviation, "active": report.active}
        new |= {f"term {n}": t for n, t in report.terms.items()}
        self.sums = {n: self.sums[n] + t.double() if n in self.sums else t.double() for n, t in new.items()}
        self.steps += 1

    def line(self, tokens: int) -> dict[str, Any]:
        """Return the sums over the last `tokens` tokens as a line of the log, and reset them."""
        s = {n: float(t) for n, t in self.sums.items()}
        self.sums, steps, self.steps = {}, self.steps, 0
        if not steps:
            return {"loss": float("nan"), "fvu": float("nan"), "l0": float("nan"), "silent": self.learner.silent()}
        terms = {n.removeprefix("term "): v / steps for n, v in s.items() if n.startswith("term ")}
        return {
            "loss": s["loss"] / steps,
            "fvu": s["error"] / max(s["deviation"], 1e-300),
            "l0": s["active"] / tokens,
            "silent": self.learner.silent(),
            "terms": terms,
        }


def late(curve: Sequence[dict[str, Any]]) -> float:
    """Return the mean loss of the last third of a curve; one that is not a number is the worst."""
    part = [c["loss"] for c in curve[-max(1, len(curve) // 3) :]]
    mean = sum(part) / len(part) if part else float("inf")
    return mean if mean == mean else float("inf")
