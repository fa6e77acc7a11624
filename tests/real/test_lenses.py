"""Lenses judged by whether a swap of two tokens along their directions swaps the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cutaway as ca
from cutaway.lenses.swap import SwapCurve
from tests.real import sets
from tests.real.written import measure

N, CONTEXTS, CONTEXT, SKIP = 10, 4, 64, 8
SWAPS = "lenses: swapping two tokens"
SHOWN = (0, 12, 20, 23, 24, 25, 26, 28, 29, 30)  # depths: 0 is the embedding, 24 the stream after layer 23


def write_swaps(results, what: str, found: SwapCurve) -> None:
    """The share of prompts whose output swaps, at some depths, beside random changes of the same length."""
    for d in SHOWN:
        swapped = measure(found.success[d], found.success_interval[d], found.success_null[d])
        effect = measure(found.effect[d], found.interval[d], found.null[d])
        results.row(SWAPS, f"{what}, depth {d:02}", N, success=swapped, effect=effect,
                    length={"value": float(found.length[d])})  # fmt: skip


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_swaps_of_capitals_begin_where_the_capital_is_brought(model, results):
    """Head 23.4 brings the capital (test_findings): no swap before it, then along Jacobian directions at once."""
    task = sets.task(model, "fact_capital", N, skip=16)
    logit = ca.lenses.swap(model, task, ca.lenses.identity_lens(model), samples=2)
    write_swaps(results, "logit lens", logit)
    bound = task.bind(model)
    words = [model.tokenizer.decode([i]) for i in torch.cat([bound.answers, bound.foils]).unique().tolist()]
    size: dict[str, Any] = {"contexts": CONTEXTS, "context": CONTEXT, "skip": SKIP, "batch": CONTEXTS * CONTEXT}
    found = ca.lenses.jacobian_directions(model, sets.docstrings(), words, **size)
    jacobian = ca.lenses.swap_along(model, task, found, samples=2)
    write_swaps(results, "Jacobian directions", jacobian)
    for curve in (logit, jacobian):
        assert float(curve.success[:24].max()) == 0.0
        assert float(curve.success_null.max()) <= 0.1
        assert float(curve.interval[30, 1]) < float(curve.null[30].min())
    assert (jacobian.interval[24:, 1] < jacobian.null[24:].min(1).values).all()
    assert (jacobian.success[24:30] >= logit.success[24:30] + 0.3).all()
