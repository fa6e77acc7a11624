"""What activation patching and its estimates return: effects on a grid whose axes say what was exchanged.

Every class has the same fields. `effect` is the mean over prompts in the metric's unit, `recovered` its share of
clean − corrupt. Where `effect` is an estimate, `exact` holds the audited cells (NaN elsewhere), `agreement` how
well it agrees with them. Where a window of layers was exchanged, `single` is the cell alone. `metrics` are
further metrics read in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from cutaway.core.result import Result


@dataclass(frozen=True, kw_only=True)
class PositionEffects(Result, kind="position_effects"):
    """Effects of exchanging one stream site at one layer and position."""

    effect: Float[Tensor, "layer position"]
    interval: Float[Tensor, "layer position bound"]
    null: Float[Tensor, "layer position sample"]
    recovered: Float[Tensor, "layer position"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    single: Float[Tensor, "layer position"] | None = None
    single_interval: Float[Tensor, "layer position bound"] | None = None
    metrics: Float[Tensor, "metric layer position"] | None = None
    metrics_interval: Float[Tensor, "metric layer position bound"] | None = None
    metrics_null: Float[Tensor, "metric layer position sample"] | None = None
    exact: Float[Tensor, "layer position"] | None = None
    exact_interval: Float[Tensor, "layer position bound"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None


@dataclass(frozen=True, kw_only=True)
class HeadEffects(Result, kind="head_effects"):
    """Effects of exchanging one head site at one layer and head, at all positions at once."""

    effect: Float[Tensor, "layer head"]
    interval: Float[Tensor, "layer head bound"]
    null: Float[Tensor, "layer head sample"]
    recovered: Float[Tensor, "layer head"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    metrics: Float[Tensor, "metric layer head"] | None = None
    metrics_interval: Float[Tensor, "metric layer head bound"] | None = None
    metrics_null: Float[Tensor, "metric layer head sample"] | None = None
    exact: Float[Tensor, "layer head"] | None = None
    exact_interval: Float[Tensor, "layer head bound"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None


@dataclass(frozen=True, kw_only=True)
class NeuronEffects(Result, kind="neuron_effects"):
    """Effects of exchanging one neuron, at all positions at once."""

    effect: Float[Tensor, "layer neuron"]
    interval: Float[Tensor, "layer neuron bound"]
    null: Float[Tensor, "layer neuron sample"]
    recovered: Float[Tensor, "layer neuron"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    metrics: Float[Tensor, "metric layer neuron"] | None = None
    metrics_interval: Float[Tensor, "metric layer neuron bound"] | None = None
    metrics_null: Float[Tensor, "metric layer neuron sample"] | None = None
    exact: Float[Tensor, "layer neuron"] | None = None
    exact_interval: Float[Tensor, "layer neuron bound"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None


@dataclass(frozen=True, kw_only=True)
class HeadPositionEffects(Result, kind="head_position_effects"):
    """Effects of exchanging one head at one position."""

    effect: Float[Tensor, "layer head position"]
    interval: Float[Tensor, "layer head position bound"]
    null: Float[Tensor, "layer head position sample"]
    recovered: Float[Tensor, "layer head position"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    metrics: Float[Tensor, "metric layer head position"] | None = None
    metrics_interval: Float[Tensor, "metric layer head position bound"] | None = None
    metrics_null: Float[Tensor, "metric layer head position sample"] | None = None
    exact: Float[Tensor, "layer head position"] | None = None
    exact_interval: Float[Tensor, "layer head position bound"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None


@dataclass(frozen=True, kw_only=True)
class NeuronPositionEffects(Result, kind="neuron_position_effects"):
    """Effects of exchanging one neuron at one position."""

    effect: Float[Tensor, "layer neuron position"]
    interval: Float[Tensor, "layer neuron position bound"]
    null: Float[Tensor, "layer neuron position sample"]
    recovered: Float[Tensor, "layer neuron position"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    metrics: Float[Tensor, "metric layer neuron position"] | None = None
    metrics_interval: Float[Tensor, "metric layer neuron position bound"] | None = None
    metrics_null: Float[Tensor, "metric layer neuron position sample"] | None = None
    exact: Float[Tensor, "layer neuron position"] | None = None
    exact_interval: Float[Tensor, "layer neuron position bound"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None


@dataclass(frozen=True, kw_only=True)
class NodeEffects(Result, kind="node_effects"):
    """Effects of exchanging places of several sites beside each other."""

    effect: Float[Tensor, "node"]
    interval: Float[Tensor, "node bound"]
    null: Float[Tensor, "node sample"]
    recovered: Float[Tensor, "node"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    metrics: Float[Tensor, "metric node"] | None = None
    metrics_interval: Float[Tensor, "metric node bound"] | None = None
    metrics_null: Float[Tensor, "metric node sample"] | None = None
    exact: Float[Tensor, "node"] | None = None
    exact_interval: Float[Tensor, "node bound"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None


Effects = PositionEffects | HeadEffects | NeuronEffects | HeadPositionEffects | NeuronPositionEffects | NodeEffects
#: axes of the grid → class
BY_AXES: dict[tuple[str, ...], type[Effects]] = {
    c.axes()["effect"]: c
    for c in (PositionEffects, HeadEffects, NeuronEffects, HeadPositionEffects, NeuronPositionEffects, NodeEffects)
}
