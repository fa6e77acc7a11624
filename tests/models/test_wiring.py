"""The wiring: counts of published graphs, and the stream as the sum of its writers."""

from functools import cache

import pytest
import torch
import transformers as tf

import cutaway as ca
from cutaway.core.node import parse_edge
from cutaway.core.refuse import Refused
from cutaway.models.edits.edge_mask import head_writes
from cutaway.models.edits.edges import precedes
from cutaway.models.edits.wiring import wiring
from tests.models.tiny import build

IDS = torch.tensor([[5, 9, 2, 11, 7, 3], [1, 4, 4, 8, 2, 6]])


@cache
def model(name):
    return ca.load(build(name))


def test_a_gpt2_small_has_the_edges_that_are_counted_elsewhere():
    small = tf.GPT2Config(vocab_size=5, n_embd=24, n_layer=12, n_head=12, n_positions=8)
    w = wiring(ca.load(tf.AutoModelForCausalLM.from_config(small)))
    assert (len(w.writers), len(w.readers), len(w.edges)) == (157, 445, 32_491)
    assert w.edges[0] == parse_edge("embed→q_in.0.0")
    assert w.edges[-1] == parse_edge("mlp_out.11→logits")


@pytest.mark.parametrize("name", ["llama_gqa", "gpt_neox_parallel", "gemma2", "qwen2", "cohere"])
def test_edges_are_those_of_single_pairs_and_keys_go_by_their_groups(name):
    m = model(name)
    w, s = wiring(m), m.shape
    assert len(w.writers) == 1 + s.n_layers * (s.n_heads + 1)
    assert len(w.readers) == s.n_layers * (s.n_heads + 2 * s.n_kv_heads + 1) + 1
    assert [[precedes(m.anatomy, u, v) for v in w.readers] for u in w.writers] == w.heard.tolist()
    assert [w.writers.index(e.source) for e in w.edges] == w.pairs[:, 0].tolist()
    assert [w.readers.index(e.target) for e in w.edges] == w.pairs[:, 1].tolist()


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "llama_gqa", "gemma2", "granite", "gpt_neox_parallel"])
def test_what_writers_write_sums_to_the_stream(name):
    """All but the constants of attention, which are the same in every run."""
    m = model(name)
    last = m.shape.n_layers - 1
    acts = m.capture(IDS, ["resid_pre.0", "z", "mlp_out", f"resid_post.{last}"])
    bias = [m.weights.o_bias[i] * m.anatomy.multiplier for i in range(last + 1)]
    total = acts["resid_pre.0"].clone()
    for w in wiring(m).writers[1:]:
        if w.site == "mlp_out":
            total += acts[str(w)]
        elif w.unit == 0:
            total += head_writes(m, w.layer, acts[f"z.{w.layer}"]).sum(2) + bias[w.layer]
    torch.testing.assert_close(total, acts[f"resid_post.{last}"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "why"), [("bert", "normed after every addition"), ("mamba", "it has no z")])
def test_models_without_such_a_sum_are_refused(name, why):
    with pytest.raises(Refused, match=why):
        wiring(model(name))
