"""Swaps along a lens's directions: exact at the last depth, as plain hooks have them before, and nothing by chance."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.core.subject import subject
from cutaway.lenses.directions import token_directions
from cutaway.lenses.swap import swap_along
from cutaway.tasks.task import Task
from tests.conformance import subjects


def test_at_the_last_depth_the_exchange_exchanges_the_logits():
    model = subjects.random_llama()
    rows = (model.hf.lm_head.weight * model.hf.model.norm.weight).norm(dim=1).detach()
    for pair in subjects.llama_task(2):
        task = Task("one", (pair,), corruption="the giver becomes another")
        got, bound = ca.lenses.swap(model, task, ca.lenses.identity_lens(model), samples=1), task.bind(model)
        a, f = int(bound.answers[0]), int(bound.foils[0])
        logits, norms = model.run_last(bound.clean)[0], rows[a] / rows[f]
        assert float(got.clean[0]) == pytest.approx(float(logits[a] - logits[f]), rel=1e-4)
        after = logits[f] * norms - logits[a] / norms
        assert float(got.effect[-1] + got.clean[0]) == pytest.approx(float(after), rel=1e-3)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("how", ["exchange", "move"])
def test_a_swap_is_what_a_plain_hook_makes_of_it(how, everywhere):
    model, task = subjects.random_llama(), subjects.llama_task(1)
    lens = subject("jacobian").example({"model": model})
    got = ca.lenses.swap(model, task, lens, how=how, everywhere=everywhere, strength=0.7, samples=1)
    bound, hf = task.bind(model), model.hf
    ids = [int(bound.answers[0]), int(bound.foils[0])]
    a, f = (normalize(lens.weight[1].T @ (hf.lm_head.weight[i] * hf.model.norm.weight), dim=-1) for i in ids)

    def hook(module: Any, args: Any, out: Any) -> Any:
        h = out if isinstance(out, torch.Tensor) else out[0]
        new, at = h.clone(), slice(1, None) if everywhere else slice(-1, None)
        x = h[:, at]
        one, other = x @ a, x @ f
        step = one[..., None] * (f - a) if how == "move" else ((other - one) / (1 - a @ f))[..., None] * (a - f)
        new[:, at] = x + 0.7 * step
        seen.append(float((0.7 * step[0, -1]).norm() / x[0, -1].norm()))
        return new if isinstance(out, torch.Tensor) else (new, *out[1:])

    seen, handle = list[float](), hf.model.layers[0].register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = hf(bound.clean.ids).logits[0, -1]
    finally:
        handle.remove()
    after = float(logits[ids[0]] - logits[ids[1]])
    assert float(got.effect[1] + got.clean[0]) == pytest.approx(after, rel=1e-3, abs=1e-4)
    assert float(got.length[1]) == pytest.approx(seen[0], rel=1e-4)
    assert bool(got.success[1]) == ((after > 0) != (float(got.clean[0]) > 0))
    other = ids[1] if float(got.clean[0]) > 0 else ids[0]
    assert bool(got.likeliest[1]) == (int(logits.argmax()) == other)


def test_the_output_of_a_trained_model_swaps_late_and_not_by_chance():
    model = subjects.miniworld()
    task = subject("task").example({"model": model})
    got = ca.lenses.swap(model, task, ca.lenses.identity_lens(model), samples=4)
    assert (got.clean > 0).all()
    assert float(got.success[-1]) == 1.0
    assert float(got.success[0]) == 0.0
    assert float(got.success_null.max()) < 0.5
    assert float(got.effect[-1]) < 4 * float(got.null[-1].min())


def test_no_change_swaps_nothing_and_random_changes_are_as_long(monkeypatch):
    model, task = subjects.random_llama(), subjects.llama_task(2)
    lens, seen = subject("lens").example({"model": model}), list[torch.Tensor]()
    for strength in (0.0, 1.0):
        got = ca.lenses.swap(model, task, lens, strength=strength, samples=2)
        assert bool((got.effect.abs() + got.null.abs().sum(1) < 1e-4).all()) == (strength == 0.0)
    module = sys.modules["cutaway.lenses.swap"]
    swept = module._swept

    def watched(model: Any, asked: Any, reads: Any, writes: Any, everywhere: bool) -> Any:
        seen.extend(w.norm(dim=-1) for w in writes)
        return swept(model, asked, reads, writes, everywhere)

    monkeypatch.setattr(module, "_swept", watched)
    ca.lenses.swap(model, task, lens, how="move", samples=2)
    torch.testing.assert_close(seen[1], seen[0])
    torch.testing.assert_close(seen[2], seen[0])


def test_directions_alone_swap_as_their_lens_does():
    model, task = subjects.random_llama(), subjects.llama_task(2)
    lens = subject("lens").example({"model": model})
    words = sorted({w for p in task for w in (p.answer, p.foil)})
    got = swap_along(model, task, token_directions(model, lens, words), samples=1)
    whole = ca.lenses.swap(model, task, lens, samples=1)
    torch.testing.assert_close(got.effect, whole.effect, rtol=1e-4, atol=1e-4)
    with pytest.raises(Refused, match="no direction of it"):
        swap_along(model, task, token_directions(model, lens, words[:1]))
