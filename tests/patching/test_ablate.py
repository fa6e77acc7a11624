"""Ablation by its definition: hooks put on by hand, one component at a time, and what the baselines promise."""

from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.patching import HeadAblation, LayerAblation, NeuronAblation, PositionAblation, ablate, activation
from cutaway.patching.baseline import derangement
from cutaway.patching.optimal import optimal_constants
from cutaway.tasks.task import Task
from tests.conformance.subjects import llama_task, miniworld, random_llama, told, uneven_task


@cache
def llama():
    return random_llama()


def by_hand(model, bound, layer, change, part="z"):
    """The task's metric with the input of one linear map changed by a plain hook."""
    block = model.hf.model.layers[layer]
    module = block.self_attn.o_proj if part == "z" else block.mlp.down_proj

    def hook(_, args):
        return (change(args[0].clone()),)

    handle = module.register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            logits = model.hf(bound.clean.ids).logits[:, -1]
    finally:
        handle.remove()
    return bound.metric(logits)


def inputs(model, ids, layer, part="z"):
    """What the linear map reads."""
    seen, block = [], model.hf.model.layers[layer]
    module = block.self_attn.o_proj if part == "z" else block.mlp.down_proj
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model.hf(ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("how", ["zero", "corrupt", "mean", "position_mean", "resample"])
def test_heads_equal_the_definition(how):
    model, task = llama(), llama_task()
    bound, width = task.bind(model), model.shape.d_head
    clean = bound.metric(model.run_last(bound.clean))
    result = ablate(model, task, how=how, samples=1)
    assert isinstance(result, HeadAblation)
    for layer in range(2):
        own, other = inputs(model, bound.clean.ids, layer), inputs(model, bound.corrupt.ids, layer)
        stand = {
            "zero": torch.zeros_like(own),
            "corrupt": other,
            "mean": own.mean((0, 1), keepdim=True).expand_as(own),
            "position_mean": own.mean(0, keepdim=True).expand_as(own),
            "resample": own[derangement(len(own))],
        }[how]
        for head in range(model.shape.n_heads):
            part = slice(head * width, (head + 1) * width)

            def change(x, part=part, stand=stand):
                x[..., part] = stand[..., part]
                return x

            effect = (by_hand(model, bound, layer, change) - clean).mean()
            assert torch.allclose(result.effect[layer, head], effect, atol=2e-5)


def test_neurons_equal_the_definition():
    model, task = llama(), llama_task()
    bound = task.bind(model)
    result = ablate(model, task, site="mlp_post", how="mean", layers="1", samples=1)
    assert isinstance(result, NeuronAblation)
    assert result.effect.shape == (1, model.shape.d_mlp)
    mean = inputs(model, bound.clean.ids, 1, "mlp").mean((0, 1))
    clean = bound.metric(model.run_last(bound.clean))
    for neuron in (0, 7, 40):

        def change(x, neuron=neuron):
            x[..., neuron] = mean[neuron]
            return x

        effect = (by_hand(model, bound, 1, change, "mlp") - clean).mean()
        assert torch.allclose(result.effect[0, neuron], effect, atol=2e-5)


def test_corrupt_ablation_is_noise_patching():
    model = llama()
    for task in (llama_task(), uneven_task()):
        heads = ablate(model, task, how="corrupt", samples=1)
        assert torch.allclose(heads.effect, activation(model, task, site="z", direction="noise").effect, atol=2e-5)
        cells = ablate(model, task, site="mlp_out", each_position=True, samples=1)
        assert isinstance(cells, PositionAblation)
        patched = activation(model, task, site="mlp_out", direction="noise")
        assert torch.allclose(cells.effect, patched.effect, atol=2e-5)
        assert cells.labels["position"] == patched.labels["position"]


def test_the_stream_at_the_end_is_the_other_run():
    model, task = llama(), llama_task()
    bound = task.bind(model)
    gap = bound.metric(model.run_last(bound.corrupt)) - bound.metric(model.run_last(bound.clean))
    whole = ablate(model, task, site="resid_post", samples=1)
    assert isinstance(whole, LayerAblation)
    assert torch.allclose(whole.effect, gap.mean().expand(2), atol=2e-5)
    last = ablate(model, task, site="resid_post", each_position=True, layers="1", samples=1)
    assert torch.allclose(last.effect[0, -1], gap.mean(), atol=2e-5)
    assert last.effect[0, :-1].abs().max() < 1e-5


def test_a_head_at_one_position_is_part_of_the_head():
    model, task = llama(), llama_task(1)
    cells = ablate(model, task, each_position=True, how="corrupt", samples=1)
    assert cells.axes()["effect"] == ("layer", "head", "position")
    changed = task.bind(model).changed[0]
    before = int(changed.nonzero()[0, 0])
    assert cells.effect[0, :, :before].abs().max() < 1e-6  # nothing differs before the first changed token
    last = ablate(model, task, how="corrupt", layers="1", samples=1)
    assert torch.allclose(cells.effect[1, :, -1], last.effect[0], atol=2e-5)  # in the last layer only the end is read


def test_the_optimal_constant_loses_least():
    model = llama()
    fitted, held = (p.bind(model) for p in llama_task(6).split(0.5, seed=0))
    places = model.places("z.0.*")
    constants, curve = optimal_constants(model, fitted.clean, places, 30)
    assert curve.shape == (4, 30)
    assert (curve[:, -1] <= curve[:, 0] + 1e-6).all()
    assert curve[:, -1].mean() < 0.9 * curve[:, 0].mean()
    own = inputs(model, fitted.clean.ids, 0)
    target = model.run_last(fitted.clean).log_softmax(-1)

    def loss(value):
        width = model.shape.d_head

        def change(x):
            x[..., :width] = value
            return x

        block = model.hf.model.layers[0].self_attn.o_proj
        handle = block.register_forward_pre_hook(lambda _, args: (change(args[0].clone()),))
        with torch.no_grad():
            out = model.hf(fitted.clean.ids).logits[:, -1].log_softmax(-1)
        handle.remove()
        return float((target.exp() * (target - out)).sum(-1).mean())

    mean, best = own[..., : model.shape.d_head].mean((0, 1)), constants[places[0]]
    assert loss(mean) == pytest.approx(float(curve[0, 0]), abs=1e-5)
    assert loss(best) < loss(mean)
    g = torch.Generator().manual_seed(0)
    near = [best + 0.1 * best.std() * torch.randn(best.shape, generator=g) for _ in range(8)]
    assert sum(loss(n) > loss(best) for n in near) >= 7
    assert len(held) == 3


def test_optimal_ablation_says_what_it_was_fitted_on():
    result = ablate(llama(), llama_task(6), how="optimal", steps=2, samples=1)
    assert result.record["split"].startswith("fitted on 3 prompts, measured on 3 others")
    assert len(result.clean) == 3
    with pytest.raises(Refused, match="one part empty"):
        ablate(llama(), llama_task(1), how="optimal")


def test_truth_on_miniworld_heads_of_indirect_objects():
    model = miniworld()
    task = ca.tasks.load("ioi", model, 16)
    result = ablate(model, task, samples=3)
    strongest = result.effect.flatten().argmin()
    assert result.effect.flatten()[strongest] < 20 * result.null.abs().mean() * -1
    assert result.interval.flatten(0, 1)[strongest, 1] < 0
    assert result.effect.sum() < 0


def test_what_cannot_be_ablated_is_refused():
    model, task = llama(), llama_task()
    for site in ("pattern", "scores", "logits", "router", "ln1.scale"):
        with pytest.raises(Refused, match="ablation of site"):
            ablate(model, task, site=site)
    with pytest.raises(Refused, match="layers"):
        ablate(model, task, layers="0,9")
    with pytest.raises(Refused, match="layers"):
        ablate(model, task, layers="first")
    with pytest.raises(Refused, match="neuron"):
        ablate(model, task, site="mlp_post", each_position=True)
    for how in ("position_mean", "resample"):
        with pytest.raises(Refused, match="differ in length"):
            ablate(model, uneven_task(), how=how)
        with pytest.raises(Refused, match="one prompt"):
            ablate(model, Task("one", (told("Mary", "John", "Anna"),)), how=how)
    with pytest.raises(Refused, match="a head or a whole layer"):
        ablate(model, task, site="mlp_post", how="optimal")
    with pytest.raises(Refused, match="steps=0"):
        ablate(model, task, how="optimal", steps=0)
