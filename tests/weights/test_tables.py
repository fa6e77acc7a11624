"""No method of weights forms a table of tokens × tokens, however large the vocabulary."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf

from cutaway.models.model import Model
from cutaway.tasks import Repeats
from cutaway.weights import circuits, composition, connections, distances, pair_scores, spectra, virtual_heads
from tests.largest import Largest

VOCABULARY = 50_000


@cache
def wide(tokens: int) -> Model:
    """A model that nobody trained, of many tokens and few dimensions."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf: Any = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=tokens, **sizes)).eval()
    return Model(hf, None, "wide")


CALLS = {
    "circuits": lambda m: circuits(m, heads="1.0", samples=2),
    "spectra": lambda m: spectra(m, samples=2),
    "distances": lambda m: distances(m, samples=2),
    "composition": lambda m: composition(m, samples=2),
    "connections": lambda m: connections(m, samples=2),
    "virtual_heads": lambda m: virtual_heads(m, Repeats(2, 8), samples=2),
    "pair_scores": lambda m: pair_scores(m, "1.0", torch.arange(100), torch.arange(m.shape.d_vocab)),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_nothing_is_as_large_as_a_hundredth_of_tokens_by_tokens(name):
    model = wide(VOCABULARY)
    with Largest() as seen:
        CALLS[name](model)
    assert VOCABULARY * 16 <= seen.most < VOCABULARY**2 / 100, "it sees the vocabulary, in blocks"


def test_the_watch_sees_a_whole_table():
    embed = wide(300).weights.embed.detach()
    with Largest() as seen:
        embed @ embed.T
    assert seen.most == 300 * 300
