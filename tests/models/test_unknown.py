"""Architectures without a row: probing finds their sites, disables with reasons what it finds wrongly, or refuses."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf

from cutaway.core.refuse import Refused
from cutaway.models.edits import Add, Scale
from cutaway.models.families import FAMILIES
from cutaway.models.model import Model
from cutaway.models.residual import decompose, logit_contributions
from cutaway.models.self_check import disabled_sites, self_check
from tests.models.common import IDS, bare, gap, noise
from tests.models.tiny import LAYERS, D, H, V

_OLD = {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": H, "n_positions": 64}
_PLAIN = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": H,
          "max_position_embeddings": 64, "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
_NEW = {**_PLAIN, "num_key_value_heads": 2, "head_dim": 8}

# configuration -> arguments, the sites it has not (beyond pos_embed and router), and those that the check disables
PROBED: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "NemotronConfig": (_NEW, {"mlp_gate"}, set()),
    "Exaone4Config": (_NEW, {"ln1.scale", "ln2.scale"}, set()),
    "Ernie4_5Config": (_NEW, set(), set()),
    "HunYuanDenseV1Config": (_NEW, set(), set()),
    "SeedOssConfig": (_NEW, set(), set()),
    "HeliumConfig": (_NEW, set(), set()),
    "VaultGemmaConfig": (_NEW, set(), set()),
    "ArceeConfig": (_NEW, {"mlp_gate"}, set()),
    "PersimmonConfig": (_PLAIN, {"mlp_gate"}, set()),
    "CodeGenConfig": ({**_OLD, "rotary_dim": 4}, {"mlp_gate", "resid_mid", "ln2.scale"}, set()),
    "MptConfig": ({"vocab_size": V, "d_model": D, "n_heads": H, "n_layers": LAYERS, "max_seq_len": 64},
                  {"mlp_gate"}, set()),
    "OlmoeConfig": ({**_NEW, "num_experts": 4, "num_experts_per_tok": 2}, {"mlp_pre", "mlp_gate", "mlp_post"}, set()),
    "GptOssConfig": ({**_NEW, "num_local_experts": 4, "num_experts_per_tok": 2},  # sinks: scores of no key
                     {"mlp_pre", "mlp_gate", "mlp_post"}, {"scores", "pattern", "v"}),
    "BitNetConfig": (_NEW, set(), {"pattern", "v", "mlp_pre", "mlp_gate"}),  # norms before both output projections
    "OpenAIGPTConfig": (_OLD, {"mlp_gate", "final.scale"}, {"attn_out", "mlp_out", "resid_mid", "ln1.scale"}),
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "xLSTMConfig": ({"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS}, "0 lists of blocks"),
    "RobertaConfig": ({**_PLAIN, "is_decoder": True}, "no output projection"),
    "ModernBertDecoderConfig": (_PLAIN, "different kinds"),
}


def build(kind: str, arguments: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = tf.AutoModelForCausalLM.from_config(getattr(tf, kind)(**arguments)).eval()
        with torch.no_grad():
            for p in hf.parameters():
                p.add_(0.2 * torch.randn_like(p)) if p.ndim == 1 else p.mul_(3.0)
    return hf.requires_grad_(False)


@cache
def probed(kind: str) -> Model:
    m = Model(build(kind, PROBED[kind][0]))
    m.disabled.update(disabled_sites(self_check(m)))
    return m


@pytest.mark.parametrize("kind", PROBED)
def test_each_site_is_found_absent_or_disabled_with_its_reason(kind):
    m, (_, absent, disabled) = probed(kind), PROBED[kind]
    assert m.family.probed
    assert m.family.name not in FAMILIES
    can = m.sites()
    gone = {s for s, text in can.items() if text.startswith("absent") and not s.startswith("ssm.")}
    assert gone - {"pos_embed", "router"} == absent
    assert {s for s, text in can.items() if text.startswith("disabled: self-check failed: ")} == disabled
    for site in disabled:
        with pytest.raises(Refused, match="self-check failed"):
            m.run(IDS, Scale(f"{site}.1", 2.0))


@pytest.mark.parametrize("kind", PROBED)
def test_what_is_left_is_right(kind):
    m = probed(kind)
    acts = m.capture(IDS, [s for s, text in m.sites().items() if text.startswith("read")])
    assert gap(acts["logits"], bare(m.hf)) < 1e-5
    if "attn_out" in m.disabled:
        return
    assert gap(acts["resid_pre"] + acts["attn_out"] + acts["mlp_out"], acts["resid_post"]) < 1e-5
    d = noise(D)
    for place in ("resid_pre.1", "attn_out.1", "mlp_out.1"):
        seen = m.capture(IDS, "resid_post.1", Add(place, d))["resid_post.1"]
        assert gap(seen, acts["resid_post.1"]) > 1e-3
    assert gap(m.run(IDS, Add("mlp_out.1", d)), m.run(IDS, Add("resid_post.1", d))) < 1e-5


@pytest.mark.parametrize(
    "kind", ["NemotronConfig", "HunYuanDenseV1Config", "PersimmonConfig", "CodeGenConfig", "Exaone4Config"]
)
def test_their_residual_stream_decomposes(kind):
    m = probed(kind)
    parts = decompose(m, IDS)
    assert gap(parts.contribution.sum(1), parts.total) < 1e-5
    tokens = torch.tensor([3, 4])
    shares, rest = logit_contributions(m, parts, tokens)
    assert gap(shares.sum(1) + rest, m.run_last(IDS)[torch.arange(2), tokens]) < 1e-5


@pytest.mark.parametrize("kind", ["PersimmonConfig", "CodeGenConfig"])
def test_a_fused_projection_in_an_unknown_order_is_not_split(kind):
    with pytest.raises(Refused, match="order of queries, keys and values"):
        probed(kind).weights.q(0)
    assert probed(kind).weights.o(0).shape == (H, D // H, D)


@pytest.mark.parametrize("kind", REFUSED)
def test_structures_that_cannot_be_read_are_refused_with_a_way_out(kind):
    arguments, word = REFUSED[kind]
    with pytest.raises(Refused, match=word) as refusal:
        Model(build(kind, arguments))
    assert "model.hf" in refusal.value.instead
