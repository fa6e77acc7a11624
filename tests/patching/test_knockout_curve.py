"""The curve of growing sets: its points by definition, and its fall against random sets where the truth is known."""

from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.interventions.components import LAYERS, all_components
from cutaway.models.edits.library import Replace
from cutaway.patching import ablate, knockout_curve
from cutaway.patching.knockout_curve import _random
from tests.conformance.subjects import llama_task, miniworld, random_llama


@cache
def llama():
    return random_llama()


@cache
def curve(name, **options):
    model = miniworld()
    return knockout_curve(model, ca.tasks.load(name, model, 24), top=6, samples=8, **options)


@pytest.mark.parametrize(("order", "mlps"), [("single", False), ("greedy", False), ("single", True)])
def test_every_step_equals_the_definition(order, mlps):
    model, task = llama(), llama_task(6)
    first, held = task.split(0.5, seed=0)
    result = knockout_curve(model, task, order=order, mlps=mlps, top=4, samples=2)
    given, sites = {}, ["z", "mlp_out"]
    bounds = {"first": first.bind(model), "held": held.bind(model)}
    for part, bound in bounds.items():
        given[part] = model.capture(bound.corrupt, sites)

    def value(part, names):
        bound = bounds[part]
        return bound.metric(model.run_last(bound.clean, [Replace(n, given[part][n]) for n in names])).mean()

    pool = [str(a) for a in all_components(model, mlps)]
    assert len(pool) == (10 if mlps else 8)
    gone: list[str] = []
    ranked = sorted(pool, key=lambda n: float(value("first", [n])))
    for step, name in enumerate(result.labels["step"]):
        if step:
            left = [n for n in pool if n not in gone]
            best = min(left, key=lambda n: float(value("first", [*gone, n]))) if order == "greedy" else ranked[step - 1]
            assert name == best
            gone.append(name)
        assert torch.allclose(result.metric[step], value("held", gone), atol=5e-5)


def test_the_first_step_is_the_strongest_single_removal():
    model, task = llama(), llama_task(8)
    first, held = task.split(0.5, seed=0)
    result = knockout_curve(model, task, top=1)
    effects = ablate(model, first, samples=1).effect
    layer, head = divmod(int(effects.argmin()), model.shape.n_heads)
    assert result.labels["step"] == ["nothing", f"z.{layer}.{head}"]
    lost = ablate(model, held, samples=1).effect[layer, head]
    assert torch.allclose(result.metric[1] - result.metric[0], lost, atol=2e-5)


def test_random_sets_are_as_large_and_avoid_what_was_removed():
    pool = all_components(llama(), mlps=False)
    for k in range(9):
        sets = _random(pool, pool[:k], 5, seed=0)[0][-1]
        assert all(len(set(s)) == k for s in sets)
        assert all(len(set(s) & set(pool[:k])) == max(0, 2 * k - 8) for s in sets)
    _, says = _random(pool, [pool[0], pool[5], pool[1], pool[2], pool[3]], 5, seed=0)
    assert list(says) == ["0 to 3", "4 to 4", "5 to 5"]  # of the first layer's four heads two can be drawn beside two
    assert says["0 to 3"] == LAYERS
    whole = knockout_curve(llama(), llama_task(6), top=99, samples=3)
    assert torch.allclose(whole.null[-1], whole.metric[-1].expand(3), atol=2e-5)
    assert torch.allclose(whole.null[0], whole.metric[0].expand(3), atol=2e-5)
    assert (whole.null[1].std() > 0).all()


def test_the_record_says_what_was_ranked_on_what():
    assert (
        knockout_curve(llama(), llama_task(6), top=1).record["split"].startswith("ranked on 3 prompts, measured on 3")
    )
    assert "same prompts" in knockout_curve(llama(), llama_task(1), top=1).record["split"]


@pytest.mark.parametrize("name", ["ioi", "facts"])
@pytest.mark.parametrize("how", ["corrupt", "mean"])
def test_truth_on_miniworld_found_sets_fall_and_random_sets_do_not(name, how):
    result = curve(name, how=how)
    assert result.accuracy[0] == 1
    assert (result.metric[2:] < result.null[2:].mean(1)).all()  # others of its layer can stand in for one head
    assert (result.metric[4:] < result.null[4:].amin(1)).all()  # below every random set of four heads and more
    assert result.accuracy[4] <= 0.5
    assert result.accuracy_null[4].mean() >= result.accuracy[4] + 0.3
    assert result.accuracy_interval[4, 1] < result.accuracy_null[4].mean()


def test_greedy_falls_at_least_as_fast_where_it_was_ranked():
    model, task = llama(), llama_task(1)  # one prompt: ranked and measured on the same
    single, greedy = (knockout_curve(model, task, order=o, top=2, samples=1) for o in ("single", "greedy"))
    assert greedy.metric[1] == single.metric[1]
    assert greedy.metric[2] <= single.metric[2] + 1e-6
