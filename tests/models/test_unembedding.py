"""Logits as the model makes them: what is done to the stream before the head and to its output, measured."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.edits.library import Ablate, Scale
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from tests.conformance.subjects import numbered_task, word_tokenizer
from tests.models.common import IDS, gap
from tests.models.tiny import LAYERS, D, H, V, build

SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": H,
                         "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
                         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
#: families that scale, cap or project on the way to the logits, and (gain, scale, cap) of that way
SCALED: dict[str, tuple[Any, tuple[float, float, float | None]]] = {
    "granitemoe": (tf.GraniteMoeConfig(**SIZES, logits_scaling=8.0, residual_multiplier=0.4), (1, 1 / 8, None)),
    "hyperclovax": (
        tf.HyperCLOVAXConfig(**SIZES, logits_scaling=0.125, residual_multiplier=0.4, use_post_norm=False),
        (1, 1 / 8, None),
    ),
    "falcon_h1": (
        tf.FalconH1Config(**SIZES, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1,
                          mamba_d_state=6, mamba_chunk_size=4, lm_head_multiplier=0.0390625),
        (1, 0.0390625, None),
    ),
    "cohere2_moe": (
        tf.Cohere2MoeConfig(**SIZES, head_dim=8, logit_scale=0.25, sliding_window=4, num_experts=4,
                            num_experts_per_tok=2, moe_intermediate_size=16),
        (1, 0.25, None),
    ),
    "minicpm3": (
        tf.MiniCPM3Config(**{**SIZES, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
                          qk_rope_head_dim=4, v_head_dim=8, dim_model_base=64),
        (2, 1, None),
    ),
    "nanochat": (tf.NanoChatConfig(**SIZES), (1, 1, 15.0)),
    "opt projected": (tf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16), (1, 1, None)),
}  # fmt: skip


@cache
def scaled(name: str) -> Model:
    """A tiny random model of a family of `SCALED`, without the sites that fail their check."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = tf.AutoModelForCausalLM.from_config(SCALED[name][0]).eval()
        with torch.no_grad():
            for p in hf.parameters():
                p.mul_(4.0) if p.ndim > 1 else p.add_(0.2 * torch.randn_like(p))
    return ca.load(hf.requires_grad_(False), tokenizer=word_tokenizer(V), name=name)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", SCALED)
def test_logits_are_read_as_the_model_makes_them(name, half):
    """Lens at the last layer and sweep = the model; shares sum to it, or are refused because a site is disabled."""
    model, task = scaled(name), numbered_task()
    if half:
        model = Model(deepcopy(model.hf).bfloat16(), model.tokenizer, name, disabled=model.disabled)
    way, (gain, scale, cap) = unembedding(model.anatomy), SCALED[name][1]
    assert (way.gain, way.scale, way.cap, way.why) == (gain, pytest.approx(scale, rel=1e-6), cap, "")
    bound = task.bind(model)
    own = model.run_last(bound.clean).float()
    lens = ca.lenses.logit_lens(model, task, samples=1)
    mean = own.softmax(-1)[range(len(bound)), bound.answers].mean()
    torch.testing.assert_close(lens.probability[-1], mean, rtol=2e-2 if half else 1e-4, atol=0)
    assert float(lens.divergence[-1].abs()) < (1e-4 if half else 1e-6) < float(lens.divergence[0])
    variants = [[Ablate("resid_pre.1@2")], [Scale("resid_post.2@-1", 0.5)]]
    swept = sweep(model, bound.clean, variants, lambda logits, prompt: logits.float())
    for got, variant in zip(swept, variants, strict=True):
        assert gap(got, model.run_last(bound.clean, variant).float()) < (2e-2 if half else 1e-5)
    if name == "falcon_h1":  # attention and a state-space layer write beside each other
        with pytest.raises(Refused, match="attn_out"):
            ca.lenses.direct_attribution(model, task, samples=1)
        return
    assert not {"attn_out", "mlp_out", "head_out"} & set(model.disabled)
    shares = ca.lenses.direct_attribution(model, task, samples=1)
    assert float(shares.residual.abs().max()) < (0.1 if half else 1e-4) * float(shares.total.abs().max())


def test_a_projected_unembedding_is_part_of_the_weights():
    """OPT whose embeddings are narrower than its stream."""
    model = scaled("opt projected")
    w, final = model.weights, model.hf.model.decoder.final_layer_norm
    x = model.capture(IDS, [f"resid_post.{LAYERS - 1}", "resid_pre.0", "pos_embed"])
    assert gap(final(x[f"resid_post.{LAYERS - 1}"]) @ w.unembed + w.unembed_bias, model.run(IDS)) < 1e-5
    assert gap(w.embed[IDS.ids] + x["pos_embed"], x["resid_pre.0"]) < 1e-5


@pytest.mark.parametrize(
    ("bend", "words"),
    [
        (lambda logits: logits + torch.arange(V), "scaled or softly capped"),
        (lambda logits: logits.log_softmax(-1), "scaled or softly capped"),
        (lambda logits: logits.clamp(-1, 1), "scaled or softly capped"),
        (lambda logits: logits.repeat(1, 1, 2), "not what its unembedding returns"),
    ],
)
def test_logits_of_another_form_are_left_to_the_model(bend, words):
    """No lens and no shares; a sweep runs the model's own forward to its end."""

    class Bent(tf.LlamaForCausalLM):
        def forward(self, *args: Any, **kw: Any) -> Any:
            out = super().forward(*args, **kw)
            out.logits = bend(out.logits)
            return out

    plain = build("llama_gqa")
    hf = Bent(plain.config).eval()
    hf.load_state_dict(plain.state_dict())
    model = Model(hf, word_tokenizer(V), "bent")
    for refused in (ca.lenses.logit_lens, ca.lenses.lens_grid, ca.lenses.direct_attribution):
        with pytest.raises(Refused, match=words):
            refused(model, numbered_task())
    swept = sweep(model, IDS, [[Ablate("resid_pre.1@2")]], lambda logits, prompt: logits)
    assert gap(swept[0], model.run_last(IDS, Ablate("resid_pre.1@2"))) < 1e-6


def test_measuring_sees_no_edits_and_is_seen_by_none():
    model = Model(build("cohere"))
    with model.edited(Scale("logits", 3.0), Scale("final.scale", 2.0), Ablate("resid_post.2")):
        assert unembedding(model.anatomy).scale == 0.5
        model.run(IDS)
    assert unembedding(model.anatomy) is unembedding(model.anatomy)


def test_another_head_is_measured_anew():
    model = Model(build("llama_gqa"))
    before = unembedding(model.anatomy)
    model.hf.lm_head = torch.nn.Sequential(torch.nn.Linear(D, V))
    assert unembedding(model.anatomy).head is model.hf.lm_head is not before.head


@pytest.mark.parametrize("name", SCALED)
def test_a_metric_of_few_tokens_computes_no_other_logits(name, monkeypatch):
    """Answers and foils in sets of several sizes: the same values as from all logits."""
    model, made = scaled(name), list[int]()
    bound = replace(numbered_task().bind(model), answer_sets=torch.tensor([[9, 3], [4, -1], [17, 2]]))
    variants = [[Ablate("resid_pre.1@2")], [Scale("resid_post.1@-1", 0.5)]]
    whole = torch.stack([bound.metric(x) for x in sweep(model, bound.clean, variants, lambda logits, prompt: logits)])
    real = nn.functional.linear

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        made.append(len(weight))
        return real(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", linear)
    few = sweep(model, bound.clean, variants, bound.measure)
    assert made[-1] == 8 or name == "falcon_h1"  # whose batches do not grow: it unembeds them itself
    torch.testing.assert_close(few, whole, rtol=1e-6, atol=1e-6)


def test_a_head_with_a_hook_is_asked_for_all_logits():
    model = Model(build("llama"), word_tokenizer(V), "hooked")
    way, x, columns = unembedding(model.anatomy), torch.randn(3, D), torch.tensor([2, 5])
    torch.testing.assert_close(way.seen(x, columns).last_logits, way.logits(x)[:, columns], rtol=1e-5, atol=1e-6)
    with model.anatomy.unembed.register_forward_hook(lambda m, args, out: out + 1):
        assert torch.equal(way.seen(x, columns).last_logits, way.logits(x)[:, columns])
