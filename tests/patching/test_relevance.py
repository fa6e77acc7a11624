"""Relevance patching: gradients' own answer where nothing is nonlinear, closer to exact effects where much is."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.model import Model
from cutaway.patching import attribution, relevance
from tests.conformance import subjects
from tests.patching.made import straight


@pytest.mark.parametrize(
    ("site", "by"), [("z", "both"), ("mlp_out", "auto"), ("resid_pre", "auto"), ("z,resid_mid", "position")]
)
def test_without_norms_and_activation_functions_it_is_attribution(site, by):
    model, task = straight(attention=1.0), subjects.llama_task(3)
    options = {"site": site, "by": by, "audit": 0}
    gradient, rules = attribution(model, task, **options), relevance(model, task, **options)
    torch.testing.assert_close(rules.effect, gradient.effect, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rules.null, gradient.null, rtol=1e-4, atol=1e-5)


def test_definition_at_the_last_mlp():
    """Σ (donor − own) · unembedding through the final norm of the patched run, its divisor held."""
    model, task = subjects.random_llama(), subjects.llama_task(2)
    got = relevance(model, task, site="mlp_out", audit=0)
    bound = task.bind(model)
    own, donor = (model.capture(t, ["mlp_out.1", "resid_post.1", "final.scale"]) for t in (bound.corrupt, bound.clean))
    step = (
        (donor["mlp_out.1"] - own["mlp_out.1"])[:, -1]
        / own["final.scale"][:, -1:]
        * model.hf.model.norm.weight.detach()
    )
    rows = model.hf.lm_head.weight.detach()
    by_hand = (step * (rows[bound.answers] - rows[bound.foils])).sum(-1).mean()
    assert float(got.effect[-1, -1]) == pytest.approx(float(by_hand), rel=1e-4)
    assert not got.effect[-1, :-1].any(), "no other position reaches the answer from there"


def test_by_neuron_and_position_it_adds_up_and_is_audited():
    model, task = subjects.random_llama(), subjects.llama_task(2)
    got = relevance(model, task, site="mlp_post", by="both", audit=5)
    torch.testing.assert_close(got.effect.sum(-1), relevance(model, task, site="mlp_post", audit=0).effect)
    assert int(got.exact.isfinite().sum()) == 5
    assert f"5 of {got.effect.numel()} cells (3 of 3, 2 of" in got.record["audited"]
    assert got.agreement_interval.shape == (4, 2)


def test_the_rules_for_attention_differ_only_where_attention_lies_ahead():
    model, task = subjects.random_llama(), subjects.llama_task(2)
    rules = ("gradient", "constant", "half")
    plain, fixed, half = (relevance(model, task, attention=a, audit=0).effect for a in rules)
    torch.testing.assert_close(plain[1], fixed[1])
    torch.testing.assert_close(plain[1], half[1])
    assert not torch.allclose(plain[0], fixed[0], rtol=1e-2)
    assert not torch.allclose(fixed[0], half[0], rtol=1e-2)


def test_on_miniworlds_facts_it_is_closer_to_exact_effects_than_gradients():
    model = subjects.miniworld()
    task = ca.tasks.load("facts", model, 6)
    gradient, rules = (f(model, task, site="resid_pre", audit=48).agreement for f in (attribution, relevance))
    assert float(rules[0]) > float(gradient[0])


def test_what_the_rules_do_not_cover_is_refused():
    model, task = subjects.random_llama(), subjects.llama_task(1)
    for site in ("q", "z,pattern", "k.1.0@-1"):
        with pytest.raises(Refused, match="holds fixed"):
            relevance(model, task, site=site, attention="constant")
    with torch.random.fork_rng():
        config = tf.MixtralConfig(
            **subjects.config().to_diff_dict() | {"model_type": "mixtral", "num_local_experts": 2}
        )
        experts = Model(tf.MixtralForCausalLM(config).eval(), subjects.tokenizer(), "experts")
    with pytest.raises(Refused, match="activation function") as refusal:
        relevance(experts, task)
    assert "attribution" in refusal.value.instead
