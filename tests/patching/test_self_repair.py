"""Direct and total effects by their definitions, the parts of their difference, and a repair planted by hand."""

import sys
from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.core.address import Address
from cutaway.interventions.ablation_values import removal
from cutaway.models.edits.library import Ablate, Freeze
from cutaway.models.model import Model
from cutaway.patching import ablate, self_repair
from tests.conformance import subjects
from tests.conformance.subjects import llama_task, random_llama, uneven_task

module = sys.modules[self_repair.__module__]  # the package's own attribute of that name is the function


@cache
def llama():
    return random_llama()


@cache
def zeroed():
    return self_repair(llama(), llama_task(), how="zero", samples=2)


def test_the_direct_effect_of_zeros_is_minus_the_direct_attribution():
    shares = ca.lenses.direct_attribution(llama(), llama_task())
    names = [f"head_out.{i}.{h}" for i in range(2) for h in range(4)]
    wanted = torch.stack([-shares.effect[shares.labels["component"].index(n)] for n in names]).reshape(2, 4)
    assert torch.allclose(zeroed().direct, wanted, atol=1e-4)


@pytest.mark.parametrize("task", [llama_task(), uneven_task()], ids=["even", "uneven"])
def test_the_total_effect_is_the_ablation(task):
    for how in ("zero", "corrupt"):
        total = self_repair(llama(), task, how=how, samples=1).total
        assert torch.allclose(total, ablate(llama(), task, how=how, samples=1).effect, atol=2e-5)


def test_parts_equal_the_definition_and_sum_to_the_effect():
    model, task, result = llama(), llama_task(), zeroed()
    bound = task.bind(model)
    clean = model.capture(bound.clean, ["attn_out", "mlp_out", "final.scale"])
    base = bound.metric(model.run_last(bound.clean))

    def loss(head, *frozen):
        edits = [Ablate(f"z.0.{head}"), *(Freeze(f, clean) for f in frozen)]
        return (bound.metric(model.run_last(bound.clean, edits)) - base).mean()

    attention, mlps, norm = "attn_out.1", ("mlp_out.0", "mlp_out.1"), "final.scale"
    for h in range(4):
        direct, total = loss(h, attention, *mlps, norm), loss(h)
        free, with_attention, with_mlps = loss(h, attention, *mlps), loss(h, *mlps), loss(h, attention)
        assert torch.allclose(result.effect[0, h], total - direct, atol=5e-5)
        assert torch.allclose(result.norm[0, h], free - direct, atol=5e-5)
        shapley = (with_attention - free + total - with_mlps) / 2
        assert torch.allclose(result.attention[0, h], shapley, atol=5e-5)
    assert torch.allclose(result.norm + result.attention + result.mlp, result.effect, atol=5e-5)
    assert result.attention[1].abs().max() < 2e-5  # nothing attends after the last layer's heads
    assert torch.allclose(result.effect, result.total - result.direct, atol=2e-5)


def test_shares_are_given_where_there_is_something_to_repair():
    result = zeroed()
    clear = result.direct.abs() >= 0.05 * result.direct.abs().max()
    assert torch.equal(~result.share.isnan(), clear)
    assert torch.allclose(result.share[clear], (1 - result.total / result.direct)[clear], atol=1e-4)
    low, high = result.share_interval[clear].unbind(-1)
    assert (low <= high).all()


def test_every_part_has_an_interval_that_the_last_head_shows():
    """At the last layer's heads attention has no part, and every mean lies within its bounds."""
    result = zeroed()
    for name in ("direct", "total", "norm", "attention", "mlp"):
        mean, bounds = getattr(result, name), getattr(result, f"{name}_interval")
        assert (bounds[..., 0] <= mean + 1e-5).all()
        assert (mean <= bounds[..., 1] + 1e-5).all()
    assert result.attention_interval[1].abs().max() < 2e-5
    assert (result.direct_interval[..., 1] > result.direct_interval[..., 0]).all()
    assert torch.allclose(
        result.total_interval, ablate(llama(), llama_task(), how="zero", samples=1).interval, atol=1e-4
    )


def planted(strength: float) -> Model:
    """The last layer's MLP writes against whatever its input writes, so that it undoes part of every loss."""
    hf = random_llama().hf
    hf.config.mlp_bias = False
    last, d = hf.model.layers[1], hf.config.hidden_size

    class Against(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = torch.nn.Linear(d, d, bias=False)
            with torch.no_grad():
                self.down_proj.weight.copy_(-strength * torch.eye(d))

        def forward(self, x):
            return self.down_proj(x)

    with torch.no_grad():
        hf.model.layers[1].self_attn.o_proj.weight.zero_()  # only the first layer's heads write
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(hf.model.layers[0].mlp, name).weight.zero_()
    last.mlp = Against()
    return Model(hf, llama().tokenizer, "planted")


def test_a_planted_repair_is_found_in_the_mlp():
    result = self_repair(planted(1.5), llama_task(), how="zero", samples=1)
    clear = ~result.share[0].isnan()
    assert (result.share[0][clear] > 0.1).all()
    assert (result.attention[0].abs() < 1e-4).all()
    strongest = int(result.direct[0].abs().argmax())
    assert result.mlp[0, strongest].abs() > 3 * result.norm[0, strongest].abs()
    assert result.mlp[0, strongest] * result.direct[0, strongest] < 0  # against the loss
    none = self_repair(planted(0.0), llama_task(), how="zero", samples=1)
    assert none.mlp.abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox_parallel", "gemma2", "granite", "falcon_7b"])
def test_what_is_held_is_a_sum_wherever_the_stream_is_one(name):
    """A forward with everything later frozen, and the edit's own change added to the last stream, say the same."""
    model = subjects.family(name)
    r = removal(model, subjects.numbered_task().bind(model), [Address("z", 0), Address("z", 1)], "corrupt")
    edits = [r.edit(Address("z", i, h)) for i in range(2) for h in range(2)]
    apart = module._Apart(model, r)
    torch.testing.assert_close(apart.alone(edits), apart._in_full(edits), atol=2e-4, rtol=2e-4)
    assert apart.sums


def test_a_stream_that_is_no_sum_is_run_in_full():
    """The last block passes on half of what it is given, so that held parts alone do not make the stream."""
    hf = random_llama().hf
    plain = hf.model.layers[1].forward
    hf.model.layers[1].forward = lambda x, *args, **kw: plain(0.5 * x, *args, **kw)
    model = Model(hf, llama().tokenizer, "halved")
    r = removal(model, llama_task().bind(model), [Address("z", 0)], "corrupt")
    apart, edits = module._Apart(model, r), [r.edit(Address("z", 0, h)) for h in range(2)]
    assert torch.equal(apart.alone(edits), apart._in_full(edits))
    assert apart.sums is False
    assert (apart._by_sum(edits) - apart._in_full(edits)).abs().max() > 1e-3


def test_parts_of_the_largest_repairs_alone():
    whole, some = (self_repair(llama(), llama_task(), samples=2, parts=n) for n in (0, 3))
    there = some.attention.isfinite()
    assert torch.equal(there, some.mlp_interval.isfinite().all(-1))
    assert set(whole.effect.abs().flatten().topk(3).indices.tolist()) == set(there.flatten().nonzero()[:, 0].tolist())
    torch.testing.assert_close(some.attention[there], whole.attention[there], atol=2e-5, rtol=1e-4)
    assert torch.equal(some.effect, whole.effect)
    assert some.record["parts"] == "of 3 of 8 heads, of the largest repair"


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_several_lengths_are_summed_apart(side, monkeypatch):
    """They run without padding, and the edit's change stands where each prompt's own tokens are."""
    tokens = Model.tokens
    monkeypatch.setattr(Model, "tokens", lambda self, prompts, *_, bos=None: tokens(self, prompts, side, bos))
    model, long = llama(), uneven_task()
    r = removal(model, long.bind(model), [Address("z", 0)], "corrupt")
    assert r.bound.clean.side == side
    apart, edits = module._Apart(model, r), [r.edit(Address("z", 0, h)) for h in range(2)]
    torch.testing.assert_close(apart._by_sum(edits), apart._in_full(edits), atol=2e-4, rtol=2e-4)
