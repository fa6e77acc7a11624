"""Composition of memories: every prediction written out by hand, and layers in which one memory decides."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.neurons import composition
from tests.conformance import subjects

ROWS = [[5 + i, 6, 7 + 3 * i, 8, 9 + i][: 3 + i % 3] for i in range(8)]
PROMPTS = ca.tasks.as_prompts(ROWS)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2"])
def test_shares_are_those_of_the_definition(name):
    model, hf = subjects.family(name), subjects.family(name).hf
    got = composition(model, PROMPTS, layers=(1,), memories=6)
    final = hf.transformer.ln_f if name == "gpt2" else hf.model.norm
    gain = final.weight.double() + (1 if name == "gemma2" else 0)
    rows, outcomes, alone = hf.lm_head.weight.double(), torch.zeros(4), 0

    def direction(x: torch.Tensor) -> int:
        x = x.double()
        return int((rows @ ((x - x.mean() if name == "gpt2" else x) * gain)).argmax())

    for ids in ROWS:
        seen = model.capture(torch.tensor([ids]), ["mlp_post.1", "mlp_out.1", "resid_post.1"])
        c, f, after = (seen[a][0, -1].double() for a in ("mlp_post.1", "mlp_out.1", "resid_post.1"))
        with torch.no_grad():
            r, o = (int(hf.lm_head(final(x.float())).argmax()) for x in (after - f, after))
        said = direction(f)
        outcomes[[r == o == said, o == r != said, o == said != r, o not in (r, said)].index(True)] += 1
        values = model.weights.mlp_out[1].double()
        if name == "gemma2":
            values = values * (1 + hf.model.layers[1].post_feedforward_layernorm.weight.double())
        size = c.abs() * values.norm(dim=1)
        alone += said not in [direction(c[n] * values[n]) for n in size.topk(6).indices]
    torch.testing.assert_close(got.share[:, 0], outcomes / len(ROWS))
    assert float(got.composed[0]) == pytest.approx(alone / len(ROWS))


def test_a_layer_whose_one_memory_decides_is_told_from_one_that_writes_nothing():
    model = subjects.random_llama(spread=1.0)
    loud, quiet = (model.hf.model.layers[i].mlp for i in (0, 1))
    with torch.no_grad():
        quiet.down_proj.weight.mul_(1e-6)
        loud.down_proj.weight.mul_(1e-3)
        loud.down_proj.weight[:, 5] = 1e4 * model.hf.lm_head.weight[33]
    prompts = ca.tasks.as_prompts([f"Then {n} went to the" for n in subjects.NAMES])
    got = composition(model, prompts, memories=3, samples=8)
    outcome = {n: got.share[i] for i, n in enumerate(got.labels["outcome"])}
    assert float(got.composed[0]) == 0, "the layer says what its one memory says"
    assert float(outcome["mlp"][0] + outcome["agreement"][0]) == 1
    assert float(outcome["residual"][1] + outcome["agreement"][1]) == 1, "nothing is added"
    assert torch.equal(got.share.sum(0), torch.ones(2))
    assert float(got.composed_null[0].max()) == 0, "of either sign it decides"


def test_signs_turned_at_random_leave_the_control_as_it_is_where_a_layer_is_random():
    """Nothing in an untrained model tells the layer's own signs from drawn ones."""
    model, g = subjects.family("llama"), torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(95, generator=g)[:40] + 3 for _ in range(3)], 1)
    got = composition(model, ca.tasks.as_prompts(rows.tolist()), layers=(1,), memories=20, samples=6)
    low, high = got.composed_interval[0].tolist()
    assert low < float(got.composed_null[0].mean()) < high
    assert 0 < float(got.composed_null[0].min()) <= float(got.composed_null[0].max()) < 1
