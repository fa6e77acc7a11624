"""Group patching: a set of one, the joint effect by hand, the interaction, and the random sets."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import cutaway as ca
from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.interventions.components import LAYERS, all_components, random_sets
from cutaway.models.edits.library import Replace
from cutaway.patching import ablate, activation, group, interactions
from cutaway.tasks.pair import Truth
from tests.conformance import subjects
from tests.patching.test_activation import BOTH, Site, ids_of


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2"])
@pytest.mark.parametrize("direction", BOTH)
def test_a_group_of_one_is_the_single_head(name, direction):
    model, task = subjects.family(name), subjects.numbered_task()
    single = activation(model, task, site="z", direction=direction, samples=1)
    for layer, head in ((0, 3), (2, 1)):
        got = group(model, task, heads=f"{layer}.{head}", direction=direction, samples=3)
        assert float(got.effect) == pytest.approx(float(single.effect[layer, head]), abs=1e-5)
        assert got.single.tolist() == pytest.approx([float(got.effect)], abs=1e-5)
        assert float(got.interaction) == pytest.approx(0, abs=1e-5)
        torch.testing.assert_close(got.interval, single.interval[layer, head], atol=1e-5, rtol=0)


@pytest.mark.parametrize("direction", BOTH)
def test_joint_effect_and_interaction_by_hand(direction):
    model, task = subjects.family("llama_gqa"), subjects.numbered_task()
    heads = [(0, 1), (0, 2), (2, 0)]
    got = group(model, task, heads=" 0.1, 0.2 ,2.0,", direction=direction, samples=3)
    assert got.labels["component"] == ["z.0.1", "z.0.2", "z.2.0"]
    model.hf.config.model_type_of_test = "llama_gqa"
    site, each, single = Site("z", model.hf, 4), [], []
    for pair in task.pairs:
        clean, corrupt = ids_of(pair.clean), ids_of(pair.corrupt)
        target, donor = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        given = {layer: site.read(donor, layer) for layer, _ in heads}
        answer, foil = int(pair.answer[1:]), int(pair.foil[1:])

        def difference(logits: torch.Tensor, a: int = answer, f: int = foil) -> float:
            return float(logits[a] - logits[f])

        def change(x: torch.Tensor, layer: int, given: dict[int, torch.Tensor] = given) -> torch.Tensor:
            for head in (h for i, h in heads if i == layer):
                x = site.change(x, given[layer], (layer, head))
            return x

        with torch.no_grad():
            base = difference(model.hf(target).logits[0, -1])
            with site._hook(0, lambda x: change(x, 0)), site._hook(2, lambda x: change(x, 2)):
                each.append(difference(model.hf(target).logits[0, -1]) - base)
        single.append([difference(site.run(target, i, given[i], h)) - base for i, h in heads])
    del model.hf.config.model_type_of_test
    joint, alone = torch.tensor(each).mean(), torch.tensor(single).mean(0)
    assert float(got.effect) == pytest.approx(float(joint), abs=2e-5)
    assert got.single.tolist() == pytest.approx(alone.tolist(), abs=2e-5)
    assert float(got.interaction) == pytest.approx(float(joint - alone.sum()), abs=5e-5)
    assert float(got.recovered) == pytest.approx(float(joint) / got.gap, abs=1e-4)


def test_random_sets_are_other_heads_and_as_many(monkeypatch):
    import importlib

    module, seen = importlib.import_module("cutaway.interventions.ablation_values"), []
    sweep = module.sweep

    def watched(model, tokens, variants, *rest, **more):
        seen.extend(variants)
        return sweep(model, tokens, variants, *rest, **more)

    monkeypatch.setattr(module, "sweep", watched)
    got = group(subjects.family("gpt2"), subjects.numbered_task(), heads="0.0,1.2", samples=6)
    chosen, drawn = {str(e.where) for e in seen[0]}, [{str(e.where) for e in v} for v in seen[3:]]
    assert got.record["random sets"] == LAYERS
    assert all({"0", "1"} == {n.split(".")[1] for n in d} for d in drawn)
    assert chosen == {"z.0.0", "z.1.2"}
    assert all(len(d) == 2 and not d & chosen for d in drawn)
    assert len({frozenset(d) for d in drawn}) > 1
    assert len(got.null) == 6


def test_all_heads_of_two_layers_exchange_what_attention_adds():
    """With the stream's other writers as they are: the group of a layer's heads equals patching all its z."""
    model, task = subjects.family("llama_gqa"), subjects.numbered_task()
    got = group(model, task, heads="1.*", direction="noise", samples=2)
    bound = task.bind(model)
    donor = model.capture(bound.corrupt, "z.1")["z.1"]
    logits = model.run_last(bound.clean, [Replace("z.1", donor)])
    want = (bound.metric(logits) - bound.metric(model.run_last(bound.clean))).mean()
    assert float(got.effect) == pytest.approx(float(want), abs=1e-5)


@pytest.mark.parametrize("heads", [",", "0", "0.9", "9.0", "a.b", "0.1@2", "0.1.2", "-1.0", "0.-1", "0.1;0.2", "*.*"])
def test_what_is_no_set_of_heads_is_refused(heads):
    with pytest.raises(Refused):
        group(subjects.family("gpt2"), subjects.numbered_task(), heads=heads)


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_a_group_of_heads_and_mlps_is_removed_by_any_baseline(how):
    model, task = subjects.random_llama(), subjects.llama_task()
    got = group(model, task, heads="0.1,1.2,mlp_out.0", how=how, samples=2)
    assert got.labels["component"] == ["z.0.1", "z.1.2", "mlp_out.0"]
    assert got.record["random sets"] == LAYERS
    heads, mlps = (ablate(model, task, site=s, how=how, samples=1) for s in ("z", "mlp_out"))
    for i, (result, at) in enumerate(((heads, (0, 1)), (heads, (1, 2)), (mlps, (0,)))):
        torch.testing.assert_close(got.single[i], result.effect[at], atol=2e-5, rtol=0)
        torch.testing.assert_close(got.single_interval[i], result.interval[at], atol=2e-5, rtol=0)
    pair, two = (f(model, task, heads="0.1,mlp_out.0", how=how) for f in (interactions, group))
    torch.testing.assert_close(two.effect, pair.joint[0, 1], atol=2e-5, rtol=0)
    torch.testing.assert_close(two.interaction, pair.effect[0, 1], atol=5e-5, rtol=0)
    torch.testing.assert_close(two.interaction_interval, pair.interval[0, 1], atol=5e-5, rtol=0)


def test_the_set_is_named_or_known():
    model, task = subjects.family("gpt2"), subjects.numbered_task()
    with pytest.raises(Refused, match="no circuit is known"):
        group(model, task)
    with pytest.raises(Refused, match="denoise removes nothing"):
        group(model, task, heads="0.1", how="mean", direction="denoise")
    known = dataclasses.replace(task, truth=Truth("made", "nobody", ("z.1.1", "mlp_out.0")))
    got = group(model, known, samples=2)
    assert got.labels["component"] == ["z.1.1", "mlp_out.0"]
    assert got.record["set"] == "known from nobody"


def test_random_sets_are_matched_as_closely_as_can_be():
    pool = all_components(subjects.family("gpt2"), mlps=True)
    heads = len([a for a in pool if a.unit is not None and a.layer == 0])
    layers = len(pool) // (heads + 1)
    assert heads >= 4
    assert layers >= 2
    for names, how in (([(0, 0), (0, 1), (1, 0)], LAYERS), ([(0, h) for h in range(heads - 1)], "of any layer")):
        chosen = [Address("z", i, h) for i, h in names] + [Address("mlp_out", 1)]
        sets, says = random_sets(pool, chosen, 5, seed=1)
        assert how in says
        for drawn in sets:
            assert not set(drawn) & set(chosen)
            assert sum(a.unit is None for a in drawn) == 1
            assert len(set(drawn)) == len(chosen)
            if how == LAYERS:
                assert sorted(a.layer or 0 for a in drawn if a.unit is not None) == [0, 0, 1]
    with pytest.raises(Refused, match="are left"):
        random_sets(pool, pool[: len(pool) // 2 + 1], 2, seed=0)


def test_a_head_named_twice_counts_once():
    model, task = subjects.family("gpt2"), subjects.numbered_task()
    twice, once = (group(model, task, heads=h, samples=2) for h in ("1.1,1.1", "1.1"))
    assert twice.labels["component"] == once.labels["component"] == ["z.1.1"]
    assert ca.patching.group is group
