"""Gradients with cuts, and relevance coefficients in place of gradients: values keep their bits, rules hold."""

from typing import Any

import pytest
import torch

from cutaway.core.address import Address
from cutaway.core.refuse import OutOfMemory, Refused
from cutaway.models.access.backward import gradients
from tests.models import common

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
MODES = ("gradient", "constant", "half")


def coefficients(name: str, sites: list[str] | str, mode: Any = "gradient", metric: Any = common.metric) -> Any:
    m = common.model(name)
    with m.edited():
        values, slopes, given = gradients(m.anatomy, common.IDS, m.places(sites), metric, relevance=mode)
    return values, slopes[0], given


def test_a_cut_lets_nothing_back_and_the_rest_is_what_freezing_leaves():
    m = common.model("gpt2")
    cut = m.places(["attn_out.1", "mlp_out.1"])
    with m.edited():
        places = m.places(["z", "resid_pre"])
        values, slopes, _ = gradients(m.anatomy, common.IDS, places, common.metric, cuts=[(), cut])
    plain = m.gradients(common.IDS, ["z", "resid_pre"], common.metric)
    assert torch.equal(values, plain[0])
    assert all(torch.equal(slopes[0][k], plain[1][k]) for k in plain[1])
    assert not slopes[1]["z.1"].any()
    torch.testing.assert_close(slopes[1]["resid_pre.1"], slopes[1]["resid_pre.2"])  # only the residual path is left
    torch.testing.assert_close(slopes[1]["z.2"], slopes[0]["z.2"])


@pytest.mark.parametrize("name", common.widely(n for n in common.CAUSAL if n not in MIXTURES))
def test_relevance_changes_coefficients_and_no_value(name):
    m = common.model(name)
    plain, slopes, given = m.gradients(common.IDS, "z", common.metric)
    hooks = sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.hf.modules())
    for mode in MODES:
        values, relevance, same = coefficients(name, "z", mode)
        assert torch.equal(values, plain), mode
        assert all(torch.equal(same[k], given[k]) for k in given), mode
        assert common.gap(relevance["z.0"], slopes["z.0"]) > 1e-3, mode
    assert sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.hf.modules()) == hooks


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "phi3", "gemma", "smollm3"])
def test_without_biases_all_relevance_arrives_at_the_embedding(name):
    """LN, identity and half rules conserve what they hand back; with the pattern held fixed so does attention."""
    m = common.model(name)
    with torch.no_grad():
        kept = {n: p.clone() for n, p in m.hf.named_parameters() if n.endswith("bias")}
        for n in kept:
            m.hf.get_parameter(n).zero_()
    values, relevance, given = coefficients(name, ["resid_pre"], "constant")
    for i in range(m.shape.n_layers):
        share = (relevance[f"resid_pre.{i}"] * given[f"resid_pre.{i}"]).sum((1, 2))
        torch.testing.assert_close(share, values, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for n, p in kept.items():
            m.hf.get_parameter(n).copy_(p)


def test_each_rule_by_hand():
    """The last block of a GPT-2, with its norm, activation function and final norm written out."""
    m = common.model("gpt2")
    last = m.shape.n_layers - 1
    sites = [f"{s}.{last}" for s in ("mlp_out", "mlp_post", "mlp_pre", "mlp_in", "resid_mid", "z", "q")]
    _, got, given = coefficients("gpt2", sites)
    acts = m.capture(common.IDS, [f"{s}.{last}" for s in ("ln2.scale", "resid_post")] + ["final.scale"])
    weight = m.hf.lm_head.weight
    direction = weight[3] - 0.5 * weight[7] + 0.1 * weight[11]

    def through(norm, g, scale):  # the transpose of (x − mean) / scale · weight
        g = g * norm.weight / scale.unsqueeze(-1)
        return g - g.mean(-1, keepdim=True)

    out = torch.zeros_like(acts[f"resid_post.{last}"])
    out[:, -1] = through(m.hf.transformer.ln_f, direction.expand(2, -1), acts["final.scale"][:, -1])
    torch.testing.assert_close(got[f"mlp_out.{last}"], out)
    mlp = m.hf.transformer.h[last].mlp
    neurons = out @ mlp.c_proj.weight.T
    torch.testing.assert_close(got[f"mlp_post.{last}"], neurons)
    before = neurons * given[f"mlp_post.{last}"] / given[f"mlp_pre.{last}"]
    torch.testing.assert_close(got[f"mlp_pre.{last}"], before, rtol=1e-4, atol=1e-6)
    read = before @ mlp.c_fc.weight.T
    mid = out + through(m.hf.transformer.h[last].ln_2, read, acts[f"ln2.scale.{last}"])
    torch.testing.assert_close(got[f"resid_mid.{last}"], mid, rtol=1e-4, atol=1e-6)
    fixed = coefficients("gpt2", [f"q.{last}", f"z.{last}"], "constant")[1]
    assert not fixed[f"q.{last}"].any()
    torch.testing.assert_close(fixed[f"z.{last}"], got[f"z.{last}"])
    half = coefficients("gpt2", [f"q.{last}", f"v.{last}", f"z.{last}"], "half")[1]
    torch.testing.assert_close(half[f"q.{last}"], got[f"q.{last}"] / 4)


def test_a_gate_gives_each_factor_half():
    sites = ["mlp_post.2", "mlp_pre.2", "mlp_gate.2"]
    _, got, given = coefficients("llama", sites)
    for factor in ("mlp_pre.2", "mlp_gate.2"):
        torch.testing.assert_close(
            got[factor] * given[factor], got["mlp_post.2"] * given["mlp_post.2"] / 2, rtol=1e-4, atol=1e-6
        )


def test_what_has_no_rule_is_refused():
    for name in (*MIXTURES, "bert"):
        m = common.model(name)
        with pytest.raises(Refused), m.edited():
            gradients(m.anatomy, common.IDS, m.places("resid_pre"), common.metric, relevance="gradient")
    m = common.model("gpt2")
    with pytest.raises(Refused, match="does not depend"), m.edited():
        gradients(
            m.anatomy,
            common.IDS,
            [Address("z", 2)],
            lambda logits: 0.0 * logits[:, 0].detach() + logits.new_ones(2).requires_grad_(),
        )


def test_memory_that_runs_out_in_a_backward_pass_is_a_refusal_of_the_batch():
    class Never(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("no more")

    m = common.model("gpt2")
    with pytest.raises(OutOfMemory, match="memory") as refusal, m.edited():
        gradients(m.anatomy, common.IDS, m.places("z"), lambda logits: Never.apply(common.metric(logits)))
    assert "fewer prompts" in refusal.value.instead
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.hf.modules())
