"""Patchscopes: the last depth speaks as the prompt itself, and numbers are those of plain edits."""

from __future__ import annotations

import importlib

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.edits.library import Replace
from tests.conformance import subjects

PROMPTS = [subjects.numbered(5, 6, 7, 8), subjects.numbered(9, 30, 31)]
TARGET = subjects.numbered(50, 51, 52, 53, 54)


def test_the_last_depth_says_what_the_prompt_itself_says():
    model = subjects.family("llama_gqa")
    got = ca.lenses.patchscope(model, ca.tasks.as_prompts(PROMPTS), target=TARGET, samples=2, decode=1)
    logits = model.run_last(PROMPTS)
    assert got.decoded[-1, :, 0].tolist() == logits.argmax(-1).tolist()
    assert float(got.probability[-1]) == pytest.approx(float(logits.softmax(-1).amax(-1).mean()), abs=1e-6)
    assert float(got.rank[-1]) == 0


@pytest.mark.parametrize("options", [{}, {"target_layer": 1}, {"back": 1, "target_back": 2}])
def test_numbers_and_words_by_hand(options):
    model, steps = subjects.family("gpt2"), 3
    got = ca.lenses.patchscope(
        model, ca.tasks.as_prompts(PROMPTS), target=TARGET, answer="w9", samples=1, decode=steps, **options
    )
    back, into, target_layer = options.get("back", 0), options.get("target_back", 0), options.get("target_layer")
    answer, start = model.text.token_id("w9"), [50, 51, 52, 53, 54]
    sites = ["resid_pre.0", *(f"resid_post.{i}" for i in range(model.shape.n_layers))]
    for n, site in enumerate(sites):
        place = site if target_layer is None else f"resid_post.{target_layer}"
        said, ranks = [], []
        for i, prompt in enumerate(PROMPTS):
            state = model.capture(prompt, site)[f"{site}@{-1 - back}"][0]
            ids = list(start)
            for step in range(steps):
                edit = Replace(f"{place}@{len(start) - 1 - into}", state)
                logits = model.run_last(subjects.numbered(*ids), edits=[edit])[0]
                if not step:
                    said.append(float(logits.softmax(-1)[answer]))
                    ranks.append(float((logits > logits[answer]).sum()))
                ids.append(int(logits.argmax()))
            assert got.decoded[n, i].tolist() == ids[len(start) :]
            assert got.labels["decoded"][n][i] == model.text.token_texts(ids[len(start) :])
        assert float(got.probability[n]) == pytest.approx(sum(said) / len(said), abs=1e-6)
        assert float(got.rank[n]) == float(torch.tensor(ranks).median())
    plain = model.run_last(TARGET)[0].softmax(-1)[answer]
    assert float(got.unpatched) == pytest.approx(float(plain), abs=1e-6)


def test_random_states_have_the_same_length(monkeypatch):
    """In a model whose first norm takes all length away nothing can be seen of it, so the edits themselves are."""
    module = importlib.import_module("cutaway.lenses.patchscope")
    seen, made = [], module._edits
    monkeypatch.setattr(module, "_edits", lambda into, x, at: (seen.append(x), made(into, x, at))[1])
    ca.lenses.patchscope(subjects.family("gpt2"), ca.tasks.as_prompts(PROMPTS), target=TARGET, samples=1, decode=1)
    own, chance, *_ = seen
    torch.testing.assert_close(chance.norm(dim=-1), own.norm(dim=-1))
    assert float(torch.cosine_similarity(own, chance, dim=-1).abs().max()) < 0.9


def test_refusals():
    model, prompts = subjects.family("gpt2"), ca.tasks.as_prompts(PROMPTS)
    for options in ({"decode": 0}, {"target_layer": 9}, {"target_back": 5, "target": TARGET}, {"back": 3}):
        with pytest.raises(Refused) as refusal:
            ca.lenses.patchscope(model, prompts, **{"target": TARGET, **options})
        assert refusal.value.instead
