"""What the self-check finds wrong about padding, batches and caches is refused, or done another way that is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models.access.forward import PADDING
from cutaway.models.edits.library import Add
from cutaway.models.generate import GENERATION
from cutaway.models.model import Model
from cutaway.models.self_check import disabled_sites, self_check
from cutaway.models.sweep.executor import sweep
from cutaway.models.sweep.plan import PREFIX, RESUME
from cutaway.models.tokens import batch
from tests.models.common import LONG, SHORT, gap, noise
from tests.models.test_unknown import build
from tests.models.tiny import LAYERS, D, H, V

_COMMON = {"vocab_size": V, "d_model": D, "decoder_layers": LAYERS, "decoder_attention_heads": H, "decoder_ffn_dim": 48,
           "max_position_embeddings": 64, "num_hidden_layers": LAYERS, "pad_token_id": 0}  # fmt: skip
_GEMMA4 = {"vocab_size": V, "vocab_size_per_layer_input": V, "hidden_size": D, "intermediate_size": 48, "head_dim": 8,
           "num_attention_heads": H, "num_key_value_heads": 2, "hidden_size_per_layer_input": 8, "global_head_dim": 8,
           "sliding_window": 4, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip


def checked(kind: str, **arguments: Any) -> Model:
    m = Model(build(kind, arguments))
    m.disabled.update(disabled_sites(self_check(m)))
    return m


def test_positions_that_padding_moves_are_refused_on_that_side():
    m = checked("PegasusConfig", **_COMMON)
    right, left = (batch([LONG, SHORT], side=s) for s in ("right", "left"))
    alone = torch.cat([m.run_last(right.row(i)) for i in range(2)])
    assert gap(m.run_last(right), alone) < 1e-5
    with pytest.raises(Refused, match="padded on the left") as refusal:
        m.run_last(left)
    assert "pad on the right" in refusal.value.instead
    d = noise(D)
    variants = [[Add(f"resid_pre.{i}@-1", d)] for i in range(LAYERS)]
    swept = sweep(m, left, variants, lambda logits, prompt: logits)  # by length, without padding
    wanted = torch.stack([torch.cat([m.run_last(left.row(i), v) for i in range(2)]) for v in variants])
    assert gap(swept, wanted) < 1e-5


@pytest.mark.parametrize(
    ("shared", "layers", "lost"),
    [(0, 3, {PREFIX}), (2, 4, {PREFIX, RESUME})],
)
def test_what_blocks_read_beside_the_stream_is_not_left_out_of_a_sweep(shared, layers, lost):
    """Gemma 4 gives every block an embedding of its own, and its last blocks the keys and values of earlier ones."""
    kinds = ("sliding_attention", "full_attention")
    m = checked("Gemma4TextConfig", **_GEMMA4, num_kv_shared_layers=shared, num_hidden_layers=layers,
                layer_types=[kinds[i % 2] for i in range(layers)])  # fmt: skip
    assert lost <= m.disabled.keys()
    t = batch([LONG, LONG[::-1]])
    variants = [[Add(f"resid_pre.{i}@{p}", noise(D))] for i in range(layers) for p in (2, -1)]
    wanted = torch.stack([m.run_last(t, v) for v in variants])
    assert gap(sweep(m, t, variants, lambda logits, prompt: logits), wanted) < 1e-5


def test_generation_that_a_cache_makes_wrong_is_refused():
    m = checked("PegasusConfig", **_COMMON)
    assert GENERATION not in m.disabled
    m = Model(m.hf, disabled={GENERATION: "self-check failed: so"})
    with pytest.raises(Refused, match="self-check failed: so"):
        m.generate(torch.tensor([LONG]), 2)
    assert set(PADDING) == {"left", "right"}
