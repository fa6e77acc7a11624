"""Trigger contexts of neurons, against plain sorting and a neuron planted by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.neurons import memories, triggers
from tests.conformance import subjects


def rows(n: int, length: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens, some longer than others."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 100, (length + i % 3,), generator=g).tolist() for i in range(n)]


@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_the_largest_activations_of_each_half_are_kept(sign, monkeypatch):
    monkeypatch.setattr(memories, "_TOKENS", 40)  # several batches
    model, texts = subjects.family("llama_gqa"), rows(9, 12)
    got = triggers(model, ca.tasks.as_prompts([*texts, texts[0]]), neurons="0.3,2.17", contexts=4, sign=sign)
    for at, (layer, n) in enumerate([(0, 3), (2, 17)]):
        for half in (0, 1):
            found = []
            for ids in texts[half::2]:
                acts = model.capture(torch.tensor([ids]), f"mlp_post.{layer}")[f"mlp_post.{layer}"][0, :, n]
                found += [(float(acts[p]), ids[p], ids[p + 1]) for p in range(1, len(ids) - 1)]
            found.sort(reverse=sign == "positive")
            torch.testing.assert_close(
                got.activation[half, at], torch.tensor([a for a, _, _ in found[:4]]), rtol=1e-4, atol=1e-5
            )
            said = got.contexts(f"{layer}.{n}", got.labels["half"][half])
            assert [c[c.index("⟦") + 1 : -1].strip() for c in said] == [f"w{t}" for _, t, _ in found[:4]]
    halves = {"chose": texts[::2], "held out": texts[1::2]}
    assert got.record["tokens"] == {name: sum(len(t) - 2 for t in half) for name, half in halves.items()}


def planted() -> ca.Model:
    """A model in which one neuron of the first layer reads one token and promotes another."""
    model = subjects.random_llama(spread=1.0)
    mlp, hf = model.hf.model.layers[0].mlp, model.hf
    at, after = model.text.token_id("Mary"), model.text.token_id("to")
    with torch.no_grad():
        hf.model.layers[0].self_attn.o_proj.weight.zero_()
        for key in (mlp.gate_proj, mlp.up_proj):
            key.weight[7] = 50 * hf.model.embed_tokens.weight[at]
        mlp.down_proj.weight[:, 7] = hf.lm_head.weight[after]
    return model


def test_a_planted_neuron_fires_at_its_token_in_other_texts_too_and_foretells_the_next():
    model = planted()
    names = ("Anna", "Tom", "Lucy", "Paul", "Emma", "John", "Peter", "Anna")
    texts = [f"Then {a} went near Mary to the park and {b} went to the store" for a, b in pairwise(names)]
    got = triggers(model, ca.tasks.as_prompts(texts), neurons="0.7,1.5", contexts=3)
    assert got.share[0] == 1
    assert got.agreement[0] == 1
    assert float(got.null[0].max()) < 0.7
    assert float(got.agreement_null[0].mean()) < 0.6
    assert all(c.endswith("⟦ Mary⟧") for c in got.contexts("0.7", "held out"))
    assert float(got.interval[0, 0]) == pytest.approx(0.4385, abs=1e-3), "Wilson of 3 in 3"


def test_one_text_has_nothing_held_out_and_says_so():
    got = triggers(subjects.family("llama"), ca.tasks.as_prompts(rows(1, 12)), top=2)
    assert got.share.isnan().all()
    assert "held out" in got.reasons["share"]
    assert got.activation[1].isnan().all()
    assert got.agreement.isfinite().all()
    for short in ([5, 6], [5]):
        with pytest.raises(Refused, match="between others") as refused:
            triggers(subjects.family("llama"), ca.tasks.as_prompts([short]), neurons="0.1")
        assert "contexts of neurons" in str(refused.value), "it names its own question, not an ablation"
