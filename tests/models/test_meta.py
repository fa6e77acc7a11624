"""Full-size models of every family on the meta device: shapes, ports and weight views, without a byte of memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.core.sites import SITES
from cutaway.models.access.ports import port
from cutaway.models.loading.load import load
from cutaway.models.model import Model
from tests.models.common import model, sites
from tests.models.tiny import CONFIGS

# name -> (configuration, arguments, shape: layers, heads, kv heads, d_model, d_head, d_mlp, vocabulary)
FULL: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "gpt2-xl": ("GPT2Config", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, (48, 25, 25, 1600, 64, 6400, 50257)),
    "gpt-neo-2.7b": ("GPTNeoConfig", {"hidden_size": 2560, "num_layers": 32, "num_heads": 20,
                     "attention_types": [[["global", "local"], 16]]}, (32, 20, 20, 2560, 128, 10240, 50257)),
    "gpt-j-6b": ("GPTJConfig", {}, (28, 16, 16, 4096, 256, 16384, 50400)),
    "pythia-6.9b": ("GPTNeoXConfig", {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32,
                    "num_hidden_layers": 32, "vocab_size": 50432}, (32, 32, 32, 4096, 128, 16384, 50432)),
    "opt-6.7b": ("OPTConfig", {"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "word_embed_proj_dim": 4096}, (32, 32, 32, 4096, 128, 16384, 50272)),
    "bloom-7b1": ("BloomConfig", {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
                  (30, 32, 32, 4096, 128, 16384, 250880)),
    "phi-2": ("PhiConfig", {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
              "num_attention_heads": 32}, (32, 32, 32, 2560, 80, 10240, 51200)),
    "phi-3-medium": ("Phi3Config", {"hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
                     "num_attention_heads": 40, "num_key_value_heads": 10}, (40, 40, 10, 5120, 128, 17920, 32064)),
    "llama-3-8b": ("LlamaConfig", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
                   (32, 32, 8, 4096, 128, 14336, 128256)),
    "mistral-7b": ("MistralConfig", {}, (32, 32, 8, 4096, 128, 14336, 32000)),
    "mixtral-8x7b": ("MixtralConfig", {}, (32, 32, 8, 4096, 128, 0, 32000)),
    "qwen2-7b": ("Qwen2Config", {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                 "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
                 (28, 28, 4, 3584, 128, 18944, 152064)),
    "qwen2-57b-a14b": ("Qwen2MoeConfig", {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
                       "num_key_value_heads": 4, "num_experts": 64}, (28, 28, 4, 3584, 128, 0, 151936)),
    "qwen3-8b": ("Qwen3Config", {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
                 (36, 32, 8, 4096, 128, 12288, 151936)),
    "qwen3-30b-a3b": ("Qwen3MoeConfig", {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
                      "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128},
                      (48, 32, 4, 2048, 128, 0, 151936)),
    "gemma-7b": ("GemmaConfig", {}, (28, 16, 16, 3072, 256, 24576, 256000)),
    "gemma-2-9b": ("Gemma2Config", {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
                   "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
                   (42, 16, 8, 3584, 256, 14336, 256000)),
    "gemma-3-1b": ("Gemma3TextConfig", {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
                   "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144},
                   (26, 4, 1, 1152, 256, 6912, 262144)),
    "olmo-7b": ("OlmoConfig", {}, (32, 32, 32, 4096, 128, 11008, 50304)),
    "olmo-2-7b": ("Olmo2Config", {"vocab_size": 100352}, (32, 32, 32, 4096, 128, 11008, 100352)),
    "olmo-3-7b": ("Olmo3Config", {"vocab_size": 100278}, (32, 32, 32, 4096, 128, 11008, 100278)),
    "falcon-7b": ("FalconConfig", {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71},
                  (32, 71, 1, 4544, 64, 18176, 65024)),
    "falcon-40b": ("FalconConfig", {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
                   "num_kv_heads": 8, "new_decoder_architecture": True}, (60, 128, 8, 8192, 64, 32768, 65024)),
    "falcon-rw-7b": ("FalconConfig", {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 64,
                     "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
                     (36, 64, 64, 4096, 64, 16384, 65024)),
    "stablelm-2-12b": ("StableLmConfig", {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                       "num_attention_heads": 32, "num_key_value_heads": 8, "use_parallel_residual": True,
                       "qk_layernorm": True}, (40, 32, 8, 5120, 160, 13824, 50304)),
    "command-r": ("CohereConfig", {}, (40, 64, 64, 8192, 128, 22528, 256000)),
    "command-r7b": ("Cohere2Config", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "num_key_value_heads": 8}, (32, 32, 8, 4096, 128, 14336, 256000)),
    "glm-4-9b": ("GlmConfig", {}, (40, 32, 2, 4096, 128, 13696, 151552)),
    "glm-4-0414": ("Glm4Config", {}, (40, 32, 2, 4096, 128, 13696, 151552)),
    "granite-3-8b": ("GraniteConfig", {"hidden_size": 4096, "intermediate_size": 12800, "num_hidden_layers": 40,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49155},
                     (40, 32, 8, 4096, 128, 12800, 49155)),
    "starcoder2-7b": ("Starcoder2Config", {"hidden_size": 4608, "intermediate_size": 18432, "num_hidden_layers": 32,
                      "num_attention_heads": 36, "num_key_value_heads": 4}, (32, 36, 4, 4608, 128, 18432, 49152)),
    "smollm3-3b": ("SmolLM3Config", {}, (36, 16, 4, 2048, 128, 11008, 128256)),
    "starcoder": ("GPTBigCodeConfig", {"n_embd": 6144, "n_layer": 40, "n_head": 48, "vocab_size": 49152},
                  (40, 48, 1, 6144, 128, 24576, 49152)),
    "bert-large": ("BertConfig", {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                   "num_attention_heads": 16}, (24, 16, 16, 1024, 64, 4096, 30522)),
}  # fmt: skip

#: the tiny model of the one has a dense layer in front, as the full-size model of the other would
ALIKE = {"Qwen2MoeConfig": "Qwen3MoeConfig"}


@cache
def full(name: str) -> Model:
    """A model of real size, whose weights have shapes and no values."""
    kind, arguments, _ = FULL[name]
    auto = tf.AutoModelForMaskedLM if kind == "BertConfig" else tf.AutoModelForCausalLM
    with torch.device("meta"):
        return Model(auto.from_config(getattr(tf, kind)(**arguments)))


@pytest.mark.parametrize("name", FULL)
def test_shapes(name):
    s = full(name).shape
    found = (s.n_layers, s.n_heads, s.n_kv_heads, s.d_model, s.d_head, s.d_mlp, s.d_vocab)
    assert found == FULL[name][2]
    assert s.context >= 512


@pytest.mark.parametrize("name", FULL)
def test_the_first_and_the_last_layer_have_the_sites_of_a_tiny_model_of_the_family(name):
    m = full(name)
    assert all(p.is_meta for p in m.hf.parameters())
    kinds = {FULL[name][0], ALIKE.get(FULL[name][0])}
    tiny = [set(sites(model(n))) for n, (kind, _) in CONFIGS.items() if kind in kinds]
    for i in (0, m.shape.n_layers - 1):
        found = {
            s.name for s in SITES if port(m.anatomy, Address(s.name, i if s.scope == "layer" else None)) is not None
        }
        assert found in tiny


@pytest.mark.parametrize("name", FULL)
def test_weight_views_have_their_shapes_at_both_ends(name):
    m = full(name)
    w, s = m.weights, m.shape
    for i in (0, s.n_layers - 1):
        assert w.q[i].shape == (s.n_heads, s.d_model, s.d_head)
        assert w.k[i].shape == w.v[i].shape == (s.n_kv_heads, s.d_model, s.d_head)
        assert w.q_bias[i].shape == (s.n_heads, s.d_head)
        assert w.k_bias[i].shape == w.v_bias[i].shape == (s.n_kv_heads, s.d_head)
        assert w.o[i].shape == (s.n_heads, s.d_head, s.d_model)
        assert w.o_bias[i].shape == (s.d_model,)
        assert w.ov(i, s.n_heads - 1).left.shape == (s.d_model, s.d_head)
        assert w.ov(i).left.shape == (s.n_heads, s.d_model, s.d_head)
        if s.d_mlp:
            assert w.mlp_in[i].shape == (s.d_model, s.d_mlp)
            assert w.mlp_out[i].shape == (s.d_mlp, s.d_model)
        if s.d_mlp and m.anatomy.part(i, "gate") is not None:
            assert w.mlp_gate[i].shape == (s.d_model, s.d_mlp)
    assert w.embed.shape == (s.d_vocab, s.d_model)
    assert w.unembed.shape == (s.d_model, s.d_vocab)
    assert w.unembed.is_meta


def test_loading_a_live_meta_model_checks_nothing_and_allocates_nothing():
    m = load(full("llama-3-8b").hf)
    assert m.disabled == {}
    assert m.device.type == "meta"


def test_opt_350m_norms_its_stream_and_projects_its_embeddings():
    config = tf.OPTConfig(
        hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16, word_embed_proj_dim=512,
        do_layer_norm_before=False,
    )  # fmt: skip
    with torch.device("meta"):
        m = Model(tf.AutoModelForCausalLM.from_config(config))
    assert m.family.post_norm
    assert "absent" in m.sites()["ln1.scale"]
    with pytest.raises(Refused, match="after the layers"):
        m.weights.folded()
