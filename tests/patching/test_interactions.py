"""Pairs of components: the interaction is joint minus singles, and has the sign that a redundancy has."""

from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.edits.library import Replace
from cutaway.patching import group, interactions
from tests.conformance.subjects import llama_task, miniworld, random_llama, uneven_task

HEADS = ("z.0.1", "z.1.2", "mlp_out.0")


@cache
def llama():
    return random_llama()


@pytest.mark.parametrize("how", ["zero", "corrupt"])
def test_it_equals_the_definition(how):
    model, task = llama(), llama_task()
    bound = task.bind(model)
    given = model.capture(bound.corrupt, ["z", "mlp_out"])
    clean = bound.metric(model.run_last(bound.clean))

    def effect(*names):
        values = [given[n] if how == "corrupt" else torch.zeros_like(given[n]) for n in names]
        edits = [Replace(n, v) for n, v in zip(names, values, strict=True)]
        return (bound.metric(model.run_last(bound.clean, edits)) - clean).mean()

    result = interactions(model, task, heads="0.1,1.2,mlp_out.0", how=how)
    assert result.labels["component"] == list(HEADS)
    for i, a in enumerate(HEADS):
        assert torch.allclose(result.single[i], effect(a), atol=2e-5)
        for j, b in enumerate(HEADS):
            if i != j:
                assert torch.allclose(result.joint[i, j], effect(a, b), atol=2e-5)
                assert torch.allclose(result.effect[i, j], effect(a, b) - effect(a) - effect(b), atol=5e-5)
    assert torch.equal(result.effect, result.effect.T)
    assert torch.equal(result.effect.diagonal(), torch.zeros(3))
    assert torch.equal(result.joint.diagonal(), result.single)


@pytest.mark.parametrize("task", [llama_task(), uneven_task()], ids=["even", "uneven"])
def test_a_pair_is_a_group_of_two(task):
    pair = interactions(llama(), task, heads="0.1,1.2")
    both = group(llama(), task, heads="0.1,1.2", direction="noise")
    assert torch.allclose(pair.joint[0, 1], both.effect, atol=2e-5)
    assert torch.allclose(pair.effect[0, 1], both.interaction, atol=5e-5)


def test_the_null_leaves_the_set_alone():
    result = interactions(llama(), llama_task(), heads="0.0,0.1,0.2,0.3")
    assert all(p.startswith("z.1.") for pair in result.record["random pairs"] for p in pair.split())
    assert result.null.shape == (4, 4, 20)


def test_truth_on_miniworld_one_head_feeds_the_next():
    model = miniworld()
    task = ca.tasks.load("ioi", model, 12)
    heads = ca.patching.ablate(model, task, samples=1).top(2, by="effect", largest=False)
    first, second = sorted(heads, key=lambda h: h["layer"])
    names = f"{first['layer']}.{first['head']},{second['layer']}.{second['head']}"
    result = interactions(model, task, heads=names, samples=8)
    # the later head has little left to lose once the earlier one is gone
    assert result.effect[0, 1] > 0
    assert result.interval[0, 1, 0] > 0
    assert result.effect[0, 1] > 5 * result.null[0, 1].abs().max()


def test_what_is_no_set_is_refused():
    for heads in ("0.0", "", "0.0,0.0", "z.0", "0.0,resid_pre.1", "0.0@1,0.1", "mlp_out.0.3,0.1"):
        with pytest.raises(Refused):
            interactions(llama(), llama_task(), heads=heads)
    with pytest.raises(Refused, match="are left"):
        interactions(llama(), llama_task(), heads="0.0,0.1,0.2,0.3,1.0,1.1,1.2")
