"""Group patching: a set of one, the joint effect by hand, the interaction, and the random sets."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.edits import Replace
from cutaway.patching import activation, group
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
    assert float(got.recovered) == pytest.approx(float(joint) / got.record["clean − corrupt"], abs=1e-4)


def test_random_sets_are_other_heads_and_as_many(monkeypatch):
    import importlib

    module, seen = importlib.import_module("cutaway.patching.group"), []
    sweep = module.sweep

    def watched(model, tokens, variants, *rest, **more):
        seen.extend(variants)
        return sweep(model, tokens, variants, *rest, **more)

    monkeypatch.setattr(module, "sweep", watched)
    got = group(subjects.family("gpt2"), subjects.numbered_task(), heads="0.0,1.2", samples=6)
    chosen, drawn = {str(e.where) for e in seen[0]}, [{str(e.where) for e in v} for v in seen[1:7]]
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


@pytest.mark.parametrize(
    "heads", ["", ",", "0", "0.9", "9.0", "a.b", "0.1@2", "0.1.2", "-1.0", "0.-1", "0.1;0.2", "*.*"]
)
def test_what_is_no_set_of_heads_is_refused(heads):
    with pytest.raises(Refused):
        group(subjects.family("gpt2"), subjects.numbered_task(), heads=heads)


def test_a_head_named_twice_counts_once():
    model, task = subjects.family("gpt2"), subjects.numbered_task()
    twice, once = (group(model, task, heads=h, samples=2) for h in ("1.1,1.1", "1.1"))
    assert twice.labels["component"] == once.labels["component"] == ["z.1.1"]
    assert ca.patching.group is group
