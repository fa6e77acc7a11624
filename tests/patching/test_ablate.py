"""Ablation by its definition: hooks put on by hand, one component at a time, and what the baselines promise."""

from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.interventions.ablation_values import derangements, ordinary
from cutaway.interventions.optimal_ablation import optimal_constants
from cutaway.models.edits.library import Replace
from cutaway.models.tokens import batch
from cutaway.patching import ablate, activation
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


def without_first(own):
    """The mean over tokens as a stand-in that leaves each prompt's first token as it is."""
    stand = own[:, 1:].mean((0, 1)).expand_as(own).clone()
    stand[:, 0] = own[:, 0]
    return stand


@pytest.mark.parametrize("how", ["zero", "corrupt", "mean", "mean with sinks", "position_mean", "resample"])
def test_heads_equal_the_definition(how):
    model, task = llama(), llama_task()
    bound, width = task.bind(model), model.shape.d_head
    clean = bound.metric(model.run_last(bound.clean))
    result = ablate(model, task, how=how.split()[0], sinks=how.endswith("sinks"), samples=1)
    assert result.grid == ("layer", "head")
    for layer in range(2):
        own, other = inputs(model, bound.clean.ids, layer), inputs(model, bound.corrupt.ids, layer)
        stands = {
            "zero": [torch.zeros_like(own)],
            "corrupt": [other],
            "mean": [without_first(own)],
            "mean with sinks": [own.mean((0, 1), keepdim=True).expand_as(own)],
            "position_mean": [own.mean(0, keepdim=True).expand_as(own)],
            "resample": [own[d] for d in derangements([range(len(own))], 4, 0)],
        }[how]
        for head in range(model.shape.n_heads):
            part, effects = slice(head * width, (head + 1) * width), []
            for stand in stands:

                def change(x, part=part, stand=stand):
                    x[..., part] = stand[..., part]
                    return x

                effects.append((by_hand(model, bound, layer, change) - clean).mean())
            assert torch.allclose(result.effect[layer, head], torch.stack(effects).mean(), atol=2e-5)


def test_neurons_equal_the_definition():
    model, task = llama(), llama_task()
    bound = task.bind(model)
    result = ablate(model, task, site="mlp_post", how="mean", layers="1", samples=1)
    assert result.grid == ("layer", "neuron")
    assert result.effect.shape == (1, model.shape.d_mlp)
    stand = without_first(inputs(model, bound.clean.ids, 1, "mlp"))
    clean = bound.metric(model.run_last(bound.clean))
    for neuron in (0, 7, 40):

        def change(x, neuron=neuron):
            x[..., neuron] = stand[..., neuron]
            return x

        effect = (by_hand(model, bound, 1, change, "mlp") - clean).mean()
        assert torch.allclose(result.effect[0, neuron], effect, atol=2e-5)


def test_means_leave_first_and_special_tokens_alone_but_not_the_last():
    model = miniworld()
    with pytest.warns(UserWarning, match="holds 2 × '<bos>'"):
        tokens = model.tokens(["Kate and Max", "Kate <bos> Max", "Kate gave <bos>"])
    assert tokens.ids[:, 0].tolist() == [model.tokenizer.bos_token_id] * 3
    begins = tokens.ids == model.tokenizer.bos_token_id
    begins[2, -1] = False
    assert torch.equal(ordinary(model, tokens), tokens.mask & ~begins)
    assert torch.equal(ordinary(model, tokens, sinks=True), tokens.mask)
    with pytest.raises(Refused, match="one token each"):
        ordinary(model, batch([[5], [6]]))


def test_a_mean_does_not_count_the_first_token_of_the_small_world():
    """The first MLP writes ten times more at the first token; averaged in and replaced, that swamps everything."""
    model, task = miniworld(), ca.tasks.load("facts", miniworld(), 8)
    norms = model.capture(task.bind(model).clean, "mlp_out.0")["mlp_out.0"].norm(dim=-1)
    assert norms[:, 0].mean() > 5 * norms[:, 1:4].mean()
    without, whole = (ablate(model, task, site="mlp_out", how="mean", sinks=s, samples=1) for s in (False, True))
    assert without.record["left in place"].startswith("each prompt's first token")
    assert "left in place" not in whole.record
    assert not torch.allclose(without.effect[0], whole.effect[0], atol=0.1)
    cells = ablate(model, task, site="mlp_out", how="mean", each_position=True, layers="0", samples=1)
    assert cells.labels["position"][0].startswith("@-") or cells.effect[0, 0] == 0


def lengths_task() -> Task:
    """Two prompts of one length, three of another and one alone."""
    tails = ("", " a book", "", " a book", " the letter of Emma", " a book")
    names = ("Mary", "John", "Anna", "Peter", "Tom", "Emma", "Mary", "John")
    return Task("lengths", tuple(told(*names[i : i + 3], tail=t) for i, t in enumerate(tails)))


@pytest.mark.parametrize("how", ["position_mean", "resample"])
def test_prompts_of_one_length_stand_in_for_each_other(how):
    model, task = llama(), lengths_task()
    groups = [[0, 2], [1, 3, 5]]
    result = ablate(model, task, how=how, samples=1, layers="0")
    assert result.record["left out"] == "1 of 6 prompts, whose length no other has"
    bound = task.bind(model)
    own = model.capture(bound.clean, "z.0")["z.0"]
    kept, heads = [0, 1, 2, 3, 5], model.shape.n_heads
    orders = derangements([[kept.index(i) for i in group] for group in groups], 4, 0)
    givers = {i: [[kept[order[kept.index(i)]]] for order in orders] for i in kept}
    if how == "position_mean":
        givers = {i: [group] for group in groups for i in group}
    want = torch.zeros(heads, 6)
    for i, sets in givers.items():
        part, real = bound.rows([i]), bound.clean.mask[i]
        tokens = part.clean.row(0)
        plain = part.metric(model.run_last(tokens))
        for head in range(heads):
            values = [own[g].mean(0)[real, head][None] for g in sets]
            changed = [part.metric(model.run_last(tokens, [Replace(f"z.0.{head}", v)])) for v in values]
            want[head, i] = (torch.stack(changed).mean(0) - plain)[0]
    assert torch.allclose(result.effect[0], want[:, kept].mean(1), atol=2e-5)


def test_every_prompt_gets_several_other_donors_of_its_group():
    groups = [[0, 3, 5], [1, 2], [4, 6, 7, 8, 9]]
    donors = derangements(groups, 4, seed=3)
    assert len(donors) == 4
    for group in groups:
        for i in group:
            given = [d[i] for d in donors]
            assert set(given) <= set(group) - {i}
            assert len(set(given)) == min(4, len(group) - 1)
    assert donors == derangements(groups, 4, seed=3) != derangements(groups, 4, seed=4)
    assert len(derangements([[0, 1]], 4, 0)) == 1


@pytest.mark.parametrize("name", ["ioi", "facts", "arithmetic", "induction"])
def test_resampling_serves_the_tasks_of_the_small_world(name):
    model = miniworld()
    result = ablate(model, ca.tasks.load(name, model, 12), how="resample", samples=1, layers="0")
    assert result.effect.isfinite().all()
    assert len(result.clean) + int(result.record.get("left out", "0").split()[0]) == 12


def test_corrupt_ablation_is_noise_patching():
    model = llama()
    for task in (llama_task(), uneven_task()):
        heads = ablate(model, task, how="corrupt", samples=1)
        assert torch.allclose(heads.effect, activation(model, task, site="z", direction="noise").effect, atol=2e-5)
        cells = ablate(model, task, site="mlp_out", each_position=True, samples=1)
        assert cells.grid == ("layer", "position")
        patched = activation(model, task, site="mlp_out", direction="noise")
        assert torch.allclose(cells.effect, patched.effect, atol=2e-5)
        assert cells.labels["position"] == patched.labels["position"]


def test_the_stream_at_the_end_is_the_other_run():
    model, task = llama(), llama_task()
    bound = task.bind(model)
    gap = bound.metric(model.run_last(bound.corrupt)) - bound.metric(model.run_last(bound.clean))
    whole = ablate(model, task, site="resid_post", samples=1)
    assert whole.grid == ("layer",)
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
    constants, curve = optimal_constants(model, fitted.clean, ordinary(model, fitted.clean), places, 30)
    assert curve.shape == (4, 30)
    assert (curve[:, -1] <= curve[:, 0] + 1e-6).all()
    assert curve[:, -1].mean() < 0.9 * curve[:, 0].mean()
    own = inputs(model, fitted.clean.ids, 0)
    target = model.run_last(fitted.clean).log_softmax(-1)

    def loss(value):
        width = model.shape.d_head

        def change(x):
            x[:, 1:, :width] = value
            return x

        block = model.hf.model.layers[0].self_attn.o_proj
        handle = block.register_forward_pre_hook(lambda _, args: (change(args[0].clone()),))
        with torch.no_grad():
            out = model.hf(fitted.clean.ids).logits[:, -1].log_softmax(-1)
        handle.remove()
        return float((target.exp() * (target - out)).sum(-1).mean())

    mean, best = own[:, 1:, : model.shape.d_head].mean((0, 1)), constants[places[0]]
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
        with pytest.raises(Refused, match="no two prompts have the same length"):
            ablate(model, uneven_task(), how=how)
        with pytest.raises(Refused, match="one prompt"):
            ablate(model, Task("one", (told("Mary", "John", "Anna"),)), how=how)
    with pytest.raises(Refused, match="a head or a whole layer"):
        ablate(model, task, site="mlp_post", how="optimal")
    with pytest.raises(Refused, match="steps=0"):
        ablate(model, task, how="optimal", steps=0)
