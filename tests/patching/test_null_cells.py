"""Nulls of some cells: those drawn have the values that they would have among all, and effects stay as they are."""

from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.core.record import counting
from cutaway.core.stats import generator
from cutaway.interventions.null_cells import draw_cells
from tests.conformance.subjects import llama_task, random_llama

METHODS = {
    "activation": ("activation", {"site": "z"}),
    "ablate": ("ablate", {}),
    "path": ("path", {}),
    "self_repair": ("self_repair", {}),
    "causal_trace by position": ("causal_trace", {"by": "position"}),
    "causal_trace by role": ("causal_trace", {"by": "role"}),
    "causal_trace of windows": ("causal_trace", {"site": "mlp_out", "window": 2, "by": "position"}),
}


@cache
def llama():
    return random_llama()


@pytest.mark.parametrize("name", METHODS)
def test_drawn_cells_have_their_values_among_all(name):
    method, given = METHODS[name]
    run = getattr(ca.patching, method)
    with counting() as every:
        whole = run(llama(), llama_task(3), samples=3, null_cells=0, **given)
    with counting() as few:
        some = run(llama(), llama_task(3), samples=3, null_cells=2, **given)
    assert torch.equal(whole.effect, some.effect)
    assert torch.equal(whole.interval, some.interval)
    there = some.null.isfinite().all(-1)
    assert int(there.sum()) == 2
    assert torch.equal(some.null.isfinite().any(-1), there)
    torch.testing.assert_close(some.null[there], whole.null[there], atol=1e-5, rtol=1e-4)
    assert few.forwards < every.forwards
    assert some.record["null"] == f"of 2 of {there.numel()} cells, drawn at random"
    assert "null" not in whole.record


def test_other_seeds_draw_other_cells_and_few_cells_are_all_taken():
    assert draw_cells([4, 7, 9], 3, generator(0)) == draw_cells([4, 7, 9], 0, generator(0)) == [4, 7, 9]
    drawn = {tuple(draw_cells(range(20), 5, generator(s))) for s in range(8)}
    assert len(drawn) > 4
    assert all(list(d) == sorted({*d}) and len(d) == 5 for d in drawn)
