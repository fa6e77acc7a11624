"""Lines beneath a picture: each rule by its axes, values and intervals as they stand in the result."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.result import Result
from cutaway.patching import Effects, KnockoutCurve
from cutaway.views.summary import summary
from tests.views import samples


@dataclass(frozen=True, kw_only=True)
class Shares(Result, kind="summary_shares"):
    """An effect, and a share that not every head has."""

    effect: Float[Tensor, "layer head"]
    share: Float[Tensor, "layer head"]
    share_interval: Float[Tensor, "layer head bound"]


def heads(**more) -> Effects:
    effect = torch.tensor([[0.5, -2.0], [1.0, 0.0]])
    bounds = torch.stack([effect - 1, effect + 1], -1)
    return Effects(
        grid=("layer", "head"), effect=effect, interval=bounds, null=torch.zeros(2, 2, 1), recovered=effect / 4,
        clean=torch.tensor([3.0, 5.0]), corrupt=torch.zeros(2), units={"effect": "logits"}, **more,
    )  # fmt: skip


def test_an_audit_is_said_with_its_intervals_and_values_stand_where_the_effect_is_largest():
    result = heads(
        exact=torch.tensor([[0.4, math.nan], [0.9, math.nan]]), agreement=torch.tensor([0.9, 0.8, 0.125]),
        agreement_interval=torch.tensor([[0.7, 1.0], [0.5, 1.0], [0.0, 0.25]]),
        labels={"statistic": ["pearson", "spearman", "sign errors"]},
    )  # fmt: skip
    assert summary(result, "effect", most=9) == [
        "agreement: pearson 0.9 [0.7, 1], spearman 0.8 [0.5, 1], sign errors 0.125 [0, 0.25]",
        "at layer 0 · head 1: recovered −0.5",
        "largest exact 0.9 (layer 1 · head 0)",
        "mean of 2 prompts: clean 4, corrupt 0",
    ]
    assert len(summary(result, "effect")) == 3


def test_an_entry_with_a_unit_of_its_own_is_said_in_it():
    labels = {"statistic": ["pearson", "spearman", "sign errors"]}
    result = heads(agreement=torch.tensor([0.9, 0.8, 0.125]), labels=labels)
    result = replace(result, units=result.units | {"agreement": "of ranks", "sign errors": "share"})
    assert (
        summary(result, "effect")[0]
        == "agreement: pearson 0.9 of ranks, spearman 0.8 of ranks, sign errors 0.125 share"
    )


def test_further_metrics_stand_beside_the_largest_effect():
    metrics = torch.arange(8.0).reshape(2, 2, 2)
    labels = {"metric": ["prob (probability)", "kl (nats)"]}
    said = summary(
        heads(metrics=metrics, metrics_interval=metrics[..., None].expand(2, 2, 2, 2), labels=labels), "effect"
    )
    assert said[0] == "at layer 0 · head 1: recovered −0.5, prob (probability) 1 [1, 1], kl (nats) 5 [5, 5]"


def test_a_comparison_in_the_record_is_said_and_the_run_is_not():
    x = torch.ones(1, 2)
    record = {"agreement": {"pearson": 0.5, "spearman": None}, "cost": {"seconds": 1.0}, "options": {"seed": 0}}
    result = Shares(effect=x, share=x, share_interval=torch.ones(1, 2, 2), record=record)
    assert summary(result, "effect") == ["agreement: pearson 0.5"]


def test_curves_over_depth_show_both_ends_beside_a_curve():
    steps, none = torch.tensor([1.0, 0.75, 0.5]), torch.full((3, 2), math.nan)
    result = KnockoutCurve(
        metric=steps, interval=none, null=torch.zeros(3, 1), accuracy=steps, accuracy_interval=none + 0,
        accuracy_null=torch.zeros(3, 1), units={"accuracy": "share of prompts"},
    )  # fmt: skip
    assert summary(result, "metric") == ["accuracy 1 → 0.5 share of prompts"]
    assert summary(samples.lens(), "probability") == [
        "largest target 86 % [82, 90] % (layer 5), largest rank 1210 (layer embed)"
    ]


def test_a_share_without_value_at_the_largest_effect_is_said_at_its_own_place():
    share, bounds = torch.tensor([[math.nan, 0.5]]), torch.zeros(1, 2, 2)
    result = Shares(effect=torch.tensor([[3.0, 1.0]]), share=share, share_interval=bounds)
    assert summary(result, "effect") == ["largest share 0.5 [0, 0] (layer 0 · head 1)"]


def test_nothing_else_is_nothing_said():
    assert summary(samples.heads(), "effect") == []
    assert summary(samples.parts(), "contribution") == ["residual −1.2e−6 logits"]
