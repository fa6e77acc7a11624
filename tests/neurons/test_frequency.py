"""Token-frequency neurons: every logit and every divergence written out, and a neuron planted along the direction."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.edits.library import Freeze, Replace
from cutaway.neurons import frequency
from cutaway.neurons.frequency import AlongMix
from tests.conformance import subjects

ROWS = [[5, 6, 7, 8, 9], [9, 5, 11], [21, 22, 23, 24], [31, 5, 32, 33]]
PROMPTS = ca.tasks.as_prompts(ROWS)


def held(model: ca.Model, row: list[int], layer: int, neuron: int, mean: float) -> Replace:
    """A neuron at its mean behind the first token, where attention rests and it keeps its own value."""
    own = model.capture(torch.tensor([row]), f"mlp_post.{layer}")[f"mlp_post.{layer}"][..., neuron].clone()
    own[:, 1:] = mean
    return Replace(f"mlp_post.{layer}.{neuron}", own)


def predictions(model: ca.Model, row: list[int], edits=()) -> torch.Tensor:
    """What the model predicts behind every token but the first [place token]."""
    return model.run(torch.tensor([row]), edits=list(edits))[0, 1:].double().softmax(-1)


def directly(model: ca.Model, layer: int, neuron: int, mean: float, unigram: torch.Tensor) -> list[torch.Tensor]:
    """Changes of KL to unigram and entropy with the final norm's scale frozen, and with the component held."""
    u = unigram.log() - unigram.log().mean()
    u, found = u / u.norm(), list[list[torch.Tensor]]()
    for row in ROWS[1::2]:
        ids, edit = torch.tensor([row]), held(model, row, layer, neuron, mean)
        frozen = Freeze("final.scale", model.capture(ids, "final.scale"))
        clean, edited, fixed = (model.run(ids, edits=e)[0, 1:].double() for e in ([], [edit], [edit, frozen]))
        along = edited + ((clean - edited) @ u)[:, None] * u
        said = [x.softmax(-1) for x in (clean, fixed, along)]
        nats = [torch.stack([(p * (p / unigram).log()).sum(-1).mean(), -(p * p.log()).sum(-1).mean()]) for p in said]
        found.append([nats[1] - nats[0], nats[2] - nats[0]])
    return [torch.stack(x).mean(0) for x in zip(*found, strict=True)]


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2"])
def test_scores_and_effects_are_those_of_the_definition(name):
    model = subjects.family(name)
    got = frequency(model, PROMPTS, neurons="1.3,2.17", tokens=8, samples=2)
    unigram = torch.cat([predictions(model, r) for r in ROWS[::2]]).mean(0)
    u = unigram.log() - unigram.log().mean()
    hf, acts = model.hf, []
    final = hf.transformer.ln_f if name == "gpt2" else hf.model.norm
    gain = final.weight.double() + (1 if name == "gemma2" else 0)
    for row in ROWS[::2]:
        acts.append(model.capture(torch.tensor([row]), "mlp_post")["mlp_post"][:, 0, 1:].double())
    acts = torch.cat(acts, 1)  # [layer place neuron]
    values, nats = [], []
    for row in ROWS[1::2]:
        p = predictions(model, row)
        nats.append(torch.stack([(p * (p / unigram).log()).sum(-1).mean(), -(p * p.log()).sum(-1).mean()]))
    torch.testing.assert_close(got.untouched.double(), torch.stack(nats).mean(0), rtol=1e-4, atol=1e-5)
    for at, (layer, n) in enumerate([(1, 3), (2, 17)]):
        v = model.weights.mlp_out[layer][n].double()
        if name == "gemma2":
            v = v * (1 + hf.model.layers[layer].post_feedforward_layernorm.weight.double())
        v = (v - v.mean() if name == "gpt2" else v) * gain
        logits = hf.lm_head.weight.double() @ v
        cosine = torch.nn.functional.cosine_similarity(logits - logits.mean(), u, dim=0)
        assert float(got.score[at]) == pytest.approx(float(cosine), rel=1e-3, abs=1e-5)
        after = []
        for row in ROWS[1::2]:
            p = predictions(model, row, [held(model, row, layer, n, float(acts[layer, :, n].mean()))])
            after.append(torch.stack([(p * (p / unigram).log()).sum(-1).mean(), -(p * p.log()).sum(-1).mean()]))
        change = torch.stack(after).mean(0) - torch.stack(nats).mean(0)
        torch.testing.assert_close(got.effect[:, at].double(), change, rtol=2e-2, atol=2e-6)
        for h, direct in enumerate(directly(model, layer, n, float(acts[layer, :, n].mean()), unigram)):
            torch.testing.assert_close(got.direct[h, :, at].double(), direct, rtol=2e-2, atol=2e-6)
            torch.testing.assert_close(got.mediated[h, :, at], got.effect[:, at] - got.direct[h, :, at])
        values.append(acts[layer, :, n].std(correction=0))
    if name == "llama_gqa":
        ends = torch.cat([model.capture(torch.tensor([r]), "resid_post.2")["resid_post.2"][0, 1:] for r in ROWS[::2]])
        scale = (1 / (ends.double().square().mean(-1) + final.variance_epsilon).sqrt()).mean()
        rows = hf.lm_head.weight.double()
        slope = ((rows - rows.mean(0)) @ (model.weights.mlp_out[2][17].double() * gain)) @ u / u.square().sum()
        assert float(got.reach[1]) == pytest.approx(float((slope * values[1] * scale).abs()), rel=1e-3)


def test_a_neuron_planted_along_the_frequencies_is_found_and_moves_predictions_along_them():
    model = subjects.random_llama(spread=1.0)
    prompts = ca.tasks.as_prompts([f"Then {n} went to the store and" for n in subjects.NAMES[:6]])
    counts = torch.bincount(prompts.bind(model).ids[::2].flatten(), minlength=model.shape.d_vocab) + 1.0
    rows, hf = model.hf.lm_head.weight.detach(), model.hf
    u = counts.log() - counts.log().mean()
    with torch.no_grad():  # the direction whose logits are nearest to u, at a neuron that reads the stream's own length
        direction = torch.linalg.lstsq(rows - rows.mean(0), u[:, None]).solution[:, 0]
        hf.model.layers[1].mlp.down_proj.weight[:, 7] = 8 * direction / direction.norm()
    got = frequency(model, prompts, unigram="counted", samples=8, top=2)
    assert got.labels["neuron"][0] == "1.7"
    assert float(got.score[0]) > float(got.null[0].max()) + 0.1
    assert abs(float(got.effect[0, 0])) > float(got.effect_null[0, 0].abs().max())
    h = got.labels["mediator"].index("unigram component")
    assert float(got.mediated[h, 0, 0] / got.effect[0, 0]) > 0.9, (
        "what it does to predictions goes along the frequencies"
    )


def test_a_neuron_that_no_token_reads_acts_through_the_norm_alone():
    model = subjects.random_llama(spread=1.0)
    with torch.no_grad():  # dimension 3 is in the null space of the unembedding
        model.hf.lm_head.weight[:, 3] = 0
        model.hf.model.layers[1].mlp.down_proj.weight[:, 7] = 20 * torch.nn.functional.one_hot(torch.tensor(3), 32)
    got = frequency(model, PROMPTS, neurons="1.7,1.9", samples=2)
    scale = got.labels["mediator"].index("final norm's scale")
    assert float(got.mediated[scale, 1, 0]) == pytest.approx(float(got.effect[1, 0]), rel=1e-3)
    assert abs(float(got.effect[1, 0])) > 100 * abs(float(got.direct[scale, 1, 0]))
    along = float(got.mediated[1 - scale, 1, 0] / got.effect[1, 0])
    assert along < 0.9, "all logits shrink, not only along the frequencies"


def test_the_control_is_the_ablation_itself_where_the_mix_is_the_neuron():
    model, ids = subjects.family("llama_gqa"), torch.tensor([ROWS[0]])
    one, where = torch.zeros(model.shape.d_mlp), torch.ones(ids.shape, dtype=torch.bool)
    one[7], where[:, 0] = 1, False
    own = model.run(ids, held(model, ROWS[0], 1, 7, 0.25))
    torch.testing.assert_close(model.run(ids, AlongMix("mlp_post.1", 7, 0.25, one, where)), own)


def test_a_neuron_that_fires_at_the_first_token_alone_is_left_as_it_is():
    """Attention rests there: held at its mean over the other tokens, it would stand for what the first one holds."""
    model = subjects.random_llama(spread=1.0)
    with torch.no_grad():  # dimension 0 is the first token's own, and this neuron reads nothing else
        embed, mlp = model.hf.model.embed_tokens.weight, model.hf.model.layers[0].mlp
        embed[:, 0], embed[40, 0] = 0, 10
        model.hf.model.layers[0].self_attn.o_proj.weight[0] = 0
        for side in (mlp.gate_proj, mlp.up_proj):
            side.weight[5] = torch.nn.functional.one_hot(torch.tensor(0), 32).float()
    got = frequency(model, ca.tasks.as_prompts([[40, *row] for row in ROWS]), neurons="0.5", samples=2)
    assert float(model.capture(torch.tensor([[40, 5]]), "mlp_post.0")["mlp_post.0"][0, 0, 5]) > 1
    assert got.effect.abs().max() < 1e-6
    assert got.effect_null.abs().max() < 1e-6


def test_what_has_no_neurons_or_names_that_are_misspelt_is_refused():
    with pytest.raises(Refused, match="written as"):
        frequency(subjects.family("llama"), PROMPTS, neurons="z.1.2")
    with pytest.raises(Refused, match="no such place"):
        frequency(subjects.family("mixtral"), PROMPTS)
    with pytest.raises(Refused, match="only first and special"):
        frequency(subjects.family("llama"), ca.tasks.as_prompts([[5, 6], [7]]), neurons="1.3")
