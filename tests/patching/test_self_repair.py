"""Direct and total effects by their definitions, the parts of their difference, and a repair planted by hand."""

from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.models.edits.library import Ablate, Freeze
from cutaway.models.model import Model
from cutaway.patching import ablate, self_repair
from tests.conformance.subjects import llama_task, random_llama, uneven_task
from tests.models.common import model as tiny


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


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox_parallel", "gemma2", "falcon_7b"])
def test_the_sites_it_freezes_are_there_in_other_families(name):
    m = tiny(name)
    assert {str(a.site) for a in m.places(["attn_out", "mlp_out", "final.scale"])} == {
        "attn_out",
        "mlp_out",
        "final.scale",
    }
