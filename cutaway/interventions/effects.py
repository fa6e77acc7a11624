"""The result of exchanging or removing components one at a time: an effect at every cell of a grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from jaxtyping import Float
from torch import Tensor

from cutaway.core.result import Result


@dataclass(frozen=True, kw_only=True)
class Effects(Result, kind="effects"):
    """Effects on a metric, one per cell, on the grid that `grid` names: (layer, head), (layer, position), (node,) …

    Every method that edits one component at a time returns this class; fields that a method does not measure are None.

    Attributes:
        effect: the mean over prompts, in the unit of the metric.
        interval: of `effect`, 95 %, over prompts.
        null: the same effects under the method's control.
        score: a size for ranking, where that differs from |effect| (attribution_star).
        recovered: `effect` as a share of clean − corrupt (cross_model: of other − clean).
        relative: the change of the answer's logit as a share of that logit (path).
        estimate: the first-order estimate of each latent (latents).
        whole: the effect of all latents at once (latents).
        error: the effect of the reconstruction error (latents).
        clean: the metric per clean prompt, without an edit.
        corrupt: the metric per corrupt prompt.
        gap: the mean of clean − corrupt (cross_model: of other − clean), of which `recovered` is a share.
        changed: the indices of the positions at which any corrupt prompt has another token.
        other: the metric per clean prompt in the other model (cross_model).
        single: the effect of the cell alone, where `effect` exchanges a window of layers.
        metrics: further metrics, read in the same runs.
        exact: the measured effect where `effect` is an estimate; NaN where it was not measured.
        exact_null: the measured effect of random steps at the same places.
        agreement: how well estimates and exact effects agree.
    """

    effect: Float[Tensor, "*cell"]
    score: Float[Tensor, "*cell"] | None = None
    interval: Float[Tensor, "*cell bound"]
    null: Float[Tensor, "*cell sample"]
    score_interval: Float[Tensor, "*cell bound"] | None = None
    score_null: Float[Tensor, "*cell sample"] | None = None
    recovered: Float[Tensor, "*cell"] | None = None
    relative: Float[Tensor, "*cell"] | None = None
    relative_interval: Float[Tensor, "*cell bound"] | None = None
    estimate: Float[Tensor, "latent"] | None = None
    whole: Float[Tensor, ""] | None = None
    error: Float[Tensor, ""] | None = None
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"] | None = None
    other: Float[Tensor, "prompt"] | None = None
    single: Float[Tensor, "*cell"] | None = None
    single_interval: Float[Tensor, "*cell bound"] | None = None
    metrics: Float[Tensor, "metric *cell"] | None = None
    metrics_interval: Float[Tensor, "metric *cell bound"] | None = None
    metrics_null: Float[Tensor, "metric *cell sample"] | None = None
    exact: Float[Tensor, "*cell"] | None = None
    exact_interval: Float[Tensor, "*cell bound"] | None = None
    exact_null: Float[Tensor, "*cell sample"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None
    gap: float | None = None
    changed: tuple[int, ...] | None = None

    def select(self, **at: Any) -> Self:
        """Return the effects restricted along axes; `changed` follows the positions."""
        kept = super().select(**at)
        if self.changed is None or "position" not in at:
            return kept
        order = self._entries("position", at["position"])
        return replace(kept, changed=tuple(n for n, i in enumerate(order) if i in self.changed))
