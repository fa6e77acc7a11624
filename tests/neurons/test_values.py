"""Values and keys of neurons in the vocabulary, against the definition written out and neurons planted by hand."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.model import Model
from cutaway.neurons import values
from tests.conformance import subjects

PROMPTS = ca.tasks.as_prompts([[5, 6, 7, 8], [9, 5, 11]])


def by_hand(model: Model, layer: int, neuron: int) -> dict[str, torch.Tensor]:
    """Every token's score on each side, with plain modules in float64."""
    hf = model.hf
    if model.family.name == "gpt2":
        block, final = hf.transformer.h[layer], hf.transformer.ln_f
        centre = lambda x: x - x.mean()  # noqa: E731
        value, key = block.mlp.c_proj.weight[neuron], block.mlp.c_fc.weight[:, neuron]
        keys, before, embed = {"reads": key}, block.ln_2.weight, hf.transformer.wte.weight
    else:
        block, final, centre = hf.model.layers[layer], hf.model.norm, lambda x: x
        value, mlp = block.mlp.down_proj.weight[:, neuron], block.mlp
        keys = {"gate reads": mlp.gate_proj.weight[neuron], "linear reads": mlp.up_proj.weight[neuron]}
        before, embed = block.post_attention_layernorm.weight, hf.model.embed_tokens.weight
    written = hf.lm_head.weight.double() @ (centre(value.double()) * final.weight.double())
    read = {n: embed.double() @ centre(k.double() * before.double()) for n, k in keys.items()}
    return {"promotes": written, "suppresses": -written, **read}


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_tokens_and_scores_are_those_of_the_definition(name):
    model, asked = subjects.family(name), [(0, 3), (2, 17), (2, 40)]
    got = values(model, PROMPTS, neurons=[f"{i}.{n}" for i, n in asked], tokens=5)
    acts = model.capture(PROMPTS.bind(model), "mlp_post")
    for at, (layer, n) in enumerate(asked):
        for side, scores in by_hand(model, layer, n).items():
            i, top = got.labels["side"].index(side), scores.topk(5)
            sign = -1 if side == "suppresses" else 1
            assert got.token[i, at].tolist() == top.indices.tolist()
            torch.testing.assert_close(got.logit[i, at].double() * sign, top.values, rtol=1e-4, atol=1e-5)
            expected = (top.values.mean() - scores.mean()) / scores.std()
            assert float(got.score[i, at]) == pytest.approx(float(expected), rel=1e-4)
            assert got.words(f"{layer}.{n}", side) == [f"w{t}" if t else "<unk>" for t in top.indices.tolist()]
        c = acts[f"mlp_post.{layer}@-1"]
        assert float(got.coefficient[at]) == pytest.approx(float(c[:, n].mean()), rel=1e-4)
        size = c.abs() * model.weights.mlp_out[layer].norm(dim=1)
        assert float(got.update[at]) == pytest.approx(float((size[:, n] / size.sum(1)).mean()), rel=1e-4)


def test_a_planted_neuron_says_its_token_beyond_the_null_and_is_found_by_its_update():
    model = subjects.random_llama(spread=1.0)
    mlp, hf = model.hf.model.layers[1].mlp, model.hf
    at = model.text.token_id("Mary")
    with torch.no_grad():
        mlp.down_proj.weight[:, 7] = hf.lm_head.weight[at]
        mlp.gate_proj.weight[7] = hf.model.embed_tokens.weight[at]
        mlp.down_proj.weight[:, 8] = 2000 * mlp.down_proj.weight[:, 8]
    got = values(model, ca.tasks.as_prompts(["Anna and Mary", "John gave"]), neurons="1.7", tokens=1, samples=30)
    for side in ("promotes", "gate reads"):
        i = got.labels["side"].index(side)
        assert got.words("1.7", side) == [model.text.token_texts([at])[0]]
        assert float(got.score[i, 0]) > float(got.null[i, 0].max()) + 1
    i = got.labels["side"].index("linear reads")
    assert float(got.score[i, 0]) < float(got.null[i, 0].max()) + 1, "nothing was planted there"
    found = values(model, ca.tasks.as_prompts(["Anna and Mary", "John gave"]), top=2)
    assert found.labels["neuron"][2] == "1.8"
    assert [n.split(".")[0] for n in found.labels["neuron"]] == ["0", "0", "1", "1"]
    assert values(model, ca.tasks.as_prompts(["Anna"]), layers=(1,), top=1).labels["neuron"] == ["1.8"]


def test_a_norm_behind_the_mlp_is_folded_in():
    model = subjects.family("gemma2")
    got = values(model, PROMPTS, neurons="1.4", tokens=3)
    block, final = model.hf.model.layers[1], model.hf.model.norm
    value = block.mlp.down_proj.weight[:, 4] * (1 + block.post_feedforward_layernorm.weight)
    scores = model.hf.lm_head.weight @ (value * (1 + final.weight))
    assert got.token[0, 0].tolist() == scores.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("llama", {"neurons": "3.1"}, "3"),
        ("llama", {"neurons": "mlp_out.1"}, "neurons are written"),
        ("llama", {"layers": (7,)}, "neurons are in layers 0 to 2"),
        ("mixtral", {}, "mlp_post"),
    ],
)
def test_what_is_no_neuron_is_refused(family, options, why):
    with pytest.raises(Refused, match=why):
        values(subjects.family(family), PROMPTS, **options)
