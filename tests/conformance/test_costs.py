"""What every method says of its cost: the bound on its card, and the dry run before it."""

from __future__ import annotations

import ast
import math
from typing import Any

import pytest

from cutaway.core.result import Result
from cutaway.models import dry
from cutaway.suites.dry_run import dry_run
from cutaway.tasks.task import Task
from tests.conformance.rows import (
    NAMED,
    OPTIONS_WIDELY,
    QUICK,
    ROWS,
    everything,
    given,
    methods,
)


def declared(name: str, kind: str, **options: Any) -> tuple[tuple[float, float], dict[str, Any]]:
    """The bound of a call, and the cost that was counted."""
    row, result = ROWS[name], everything(name, kind, **options)[0]
    # An axis that this result does not have counts nothing.
    sizes: dict[str, Any] = {n.id: 0 for n in ast.walk(ast.parse(row.cost)) if isinstance(n, ast.Name)}
    sizes |= row.sizes(given(name, kind), result.record["options"], result if isinstance(result, Result) else None)
    task = next((x for x in given(name, kind) if isinstance(x, Task)), None)
    position = 1.0 if task is None else float(task.bind(given(name, kind)[0]).clean.lengths.reciprocal().mean())
    return row.bound(sizes, position), result.record["cost"]


@pytest.mark.parametrize(("name", "options"), OPTIONS_WIDELY)
def test_declared_cost_is_an_upper_bound(name, options):
    (forwards, backwards), cost = declared(name, "llama", **options)
    assert cost["forwards"] <= forwards + 1e-6
    assert cost["backwards"] <= backwards + 1e-6
    counted = cost["forwards"] + cost["backwards"]
    assert counted > 0 if forwards + backwards > 0 else counted == 0  # weights and files need no forward


#: methods whose bound is more than twice what is counted here, and by how much: on this model many cells are equal in
#: both runs or too few to fill the options, what a set without members would have cost is not run, and
#: half of the pairs are held out
LOOSE = {
    "heads.roles": 16, "heads.successor": 15, "patching.activation": 13, "patching.causal_trace": 8,
    "neurons.importance": 7, "lenses.swap": 4, "patching.interactions": 4, "patching.self_repair": 4,
    "patching.ablate": 4, "heads.function_vectors": 4, "lenses.debug": 4, "graphs.trace": 3, "graphs.head_loadings": 3,
    "graphs.validate": 3, "graphs.supernodes": 3, "patching.group": 3, "heads.retrieval": 3, "patching.attribution": 3,
    "patching.relevance": 3, "patching.attribution_star": 3, "patching.knockout_curve": 3,
    "dictionaries.loss_recovered": 3, "directions.propagate": 3,
    "circuits.eap": 4, "circuits.eap_ig": 3, "circuits.clean_corrupted": 4, "circuits.relp": 4, "circuits.exact": 7,
    "circuits.acdc": 4,
    "directions.das": 4, "directions.interchange": 8, "directions.select": 4,
    "directions.complete": 8,
    "directions.erase": 3, "neurons.frequency": 3, "neurons.arithmetic": 3,
}  # fmt: skip


@methods
def test_the_bound_is_at_most_twice_what_is_counted(name):
    bound, cost = declared(name, "llama")
    assert sum(bound) <= LOOSE.get(ROWS[name].name, 2) * (cost["forwards"] + cost["backwards"]) + 1e-6


@pytest.mark.parametrize("name", ["patching.path", "patching.knockout"])
def test_sweeps_of_the_last_position_are_bounded_within_twice_on_a_trained_model_too(name):
    bound, cost = declared(name, "miniworld")
    assert cost["forwards"] <= sum(bound) <= 2 * cost["forwards"]


#: methods in which values decide how much is done, at every option ("") or at one, and the share by which a plan with
#: made-up values is off at most
BY_VALUES = {
    ("patching.knockout_curve", ""): 0.1,
    ("patching.self_repair", "parts"): 0.15,
    ("neurons.arithmetic", ""): 0.05,
    ("heads.function_vectors", ""): 0.05,
    ("circuits.eap_ig_activations", ""): 0.05,  # which edges are audited
    ("circuits.mask_gradients", ""): 0.05,
    **{(f"circuits.{n}", ""): 0.15 for n in ("edge_pruning", "subnetwork_probing", "uniform_gradient_sampling")},
    ("circuits.acdc", ""): 0.5,  # which guesses are wrong
    ("graphs.feature_circuit", ""): 0.05,
    ("directions.suffix", ""): 0.1,
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
