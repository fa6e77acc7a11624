"""What every method says of its cost: the bound on its card, and the dry run before it."""

from __future__ import annotations

import ast
import math

import pytest

from cutaway.core.result import Result
from cutaway.models import dry
from cutaway.suites.dry_run import dry_run
from tests.conformance.rows import (
    NAMED,
    OPTIONS_WIDELY,
    QUICK,
    ROWS,
    everything,
    given,
    with_options,
)


@with_options
def test_declared_cost_is_an_upper_bound(name, options):
    row, result = ROWS[name], everything(name, "llama", **options)[0]
    # An axis that this result does not have counts nothing.
    sizes: dict[str, float] = {n.id: 0 for n in ast.walk(ast.parse(row.cost)) if isinstance(n, ast.Name)}
    sizes |= {n: v for n, v in result.record["options"].items() if isinstance(v, int)}
    for thing in given(name, "llama"):
        sizes.update(thing.sizes())
    sizes.update(result.sizes() if isinstance(result, Result) else {})
    forwards, backwards = row.bound(sizes)
    cost = result.record["cost"]
    assert cost["forwards"] <= forwards + 1e-6
    assert cost["backwards"] <= backwards + 1e-6
    counted = cost["forwards"] + cost["backwards"]
    assert counted > 0 if forwards + backwards > 0 else counted == 0  # weights and files need no forward


#: methods in which values decide how much is done, at every option ("") or at one, and the share by which a plan with
#: made-up values is off at most
BY_VALUES = {
    ("patching.knockout_curve", ""): 0.1,
    ("patching.self_repair", "parts"): 0.15,
    ("neurons.arithmetic", ""): 0.05,
    ("graphs.feature_circuit", ""): 0.05,
}


@pytest.mark.parametrize(("name", "options"), OPTIONS_WIDELY)
def test_a_dry_run_tells_the_forwards_that_are_then_counted(name, options, monkeypatch):
    monkeypatch.setattr(dry, "_POSITIONS", 1)  # two variants of every sweep
    quick = {o.name: QUICK[o.name] for o in ROWS[name].options if o.name in QUICK}
    asked = {**quick, **NAMED.get(name, {}), **options}
    told = dry_run(ROWS[name].function, *given(name, "llama"), **asked)
    cost = everything(name, "llama", **options)[0].record["cost"]
    if told.plain is None:  # it repeats no forward of a batch of prompts: its card's bound, or words
        assert told.says
        assert told.seconds is None
        assert (told.forwards or math.inf) >= cost["forwards"] or told.forwards == cost["forwards"] == 0
        return
    shares = [x for (n, o), x in BY_VALUES.items() if n == ROWS[name].name and (not o or o in options)]
    share = max(shares, default=1e-9)
    assert told.forwards == pytest.approx(cost["forwards"], rel=share)
    assert told.backwards == pytest.approx(cost["backwards"], rel=share)
    assert told.seconds > 0
    assert told.memory > told.weights
    assert told.spent_forwards < told.forwards + told.backwards or not told.batch
