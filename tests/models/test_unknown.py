"""Architectures without a row: what cannot be told from their structure is refused (test_every.py sweeps them all)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf

from cutaway.core.refuse import Refused
from cutaway.models.model import Model
from cutaway.models.self_check import disabled_sites, self_check
from tests.models.tiny import LAYERS, D, H, V

_OLD = {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": H, "n_positions": 64}
_PLAIN = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": H,
          "max_position_embeddings": 64, "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip

PROBED: dict[str, dict[str, Any]] = {"PersimmonConfig": _PLAIN, "CodeGenConfig": {**_OLD, "rotary_dim": 4}}
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
    m = Model(build(kind, PROBED[kind]))
    m.disabled.update(disabled_sites(self_check(m)))
    return m


@pytest.mark.parametrize("kind", ["PersimmonConfig", "CodeGenConfig"])
def test_a_fused_projection_in_an_unknown_order_is_not_split(kind):
    with pytest.raises(Refused, match="order of queries, keys and values"):
        probed(kind).weights.q[0]
    assert probed(kind).weights.o[0].shape == (H, D // H, D)


@pytest.mark.parametrize("kind", REFUSED)
def test_structures_that_cannot_be_read_are_refused_with_a_way_out(kind):
    arguments, word = REFUSED[kind]
    with pytest.raises(Refused, match=word) as refusal:
        Model(build(kind, arguments))
    assert "model.hf" in refusal.value.instead
