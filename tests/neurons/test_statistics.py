"""Statistics of neurons' values, against every logit written out and neurons planted by hand."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.neurons import statistics
from tests.conformance import subjects

PROMPTS = ca.tasks.as_prompts([[5, 6, 7, 8], [9, 5, 11]])


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_logit_variance_and_kurtosis_are_those_of_the_definition(name):
    from scipy import stats

    model = subjects.family(name)
    got, hf = statistics(model, PROMPTS, layers=(1,)), model.hf
    final = hf.transformer.ln_f if name == "gpt2" else hf.model.norm
    rows = hf.lm_head.weight.double() * final.weight.double()
    rows = rows - rows.mean(1, keepdim=True) if name == "gpt2" else rows
    cosine = torch.nn.functional.cosine_similarity
    for n in (0, 17):
        v = model.weights.mlp_out[1][n].double()
        assert float(got.score[0, 0, n]) == pytest.approx(float(cosine(rows, v[None]).var(correction=0)), rel=1e-4)
        assert float(got.score[2, 0, n]) == pytest.approx(float(stats.kurtosis(v.numpy())), rel=1e-4)
        assert float(got.norm[0, n]) == pytest.approx(float(v.norm()), rel=1e-5)
    if name == "gpt2":  # centred rows read nothing along ones
        direction = torch.ones(32).double() / 32**0.5
        expected = (model.weights.mlp_out[1].double() @ direction).abs() / model.weights.mlp_out[1].double().norm(dim=1)
        torch.testing.assert_close(got.score[1, 0].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_neuron_that_writes_where_nothing_is_read_stands_out_and_so_does_a_single_dimension():
    model = subjects.random_llama(spread=1.0)
    hf = model.hf
    u = torch.linalg.svd(hf.lm_head.weight.double(), full_matrices=True)[2]
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[:, 7] = u[-1].float()
        hf.model.layers[1].mlp.down_proj.weight[:, 8] = torch.eye(32)[3]
    got = statistics(model, ca.tasks.as_prompts(["Anna and Mary"]), samples=10)
    assert float(got.score[1, 1, 7]) == pytest.approx(1, abs=1e-4)
    assert float(got.score[0, 1, 7]) < float(got.null[0, 1, 7].min())
    assert float(got.score[2, 1, 8]) > float(got.null[2, 1, 8].max()) + 5
    plain = got.score[2, 0].mean()
    assert abs(float(plain)) < 1, "random weights have no privileged basis"
