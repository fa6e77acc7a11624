"""The residual stream as an exact sum, and logits as sums of its parts."""

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models.anatomy.residual import decompose, last_stream, logit_contributions, logit_shares
from cutaway.models.edits.library import Ablate
from cutaway.models.tokens import batch
from tests.models.common import CAUSAL, IDS, LONG, PADDED, SHORT, gap, model, uncapped, widely

TOKENS, FOILS = torch.tensor([3, 4]), torch.tensor([7, 8])
ROWS = torch.arange(2)


def neurons(m):
    return [i for i in range(m.shape.n_layers) if m.anatomy.part(i, "down") is not None]


@pytest.mark.parametrize("name", widely(CAUSAL))
@pytest.mark.parametrize("side", ["left", "right"])
def test_components_sum_to_the_stream_and_their_shares_to_the_logits(name, side):
    m, t = model(name), PADDED[side]
    parts = decompose(m, t, neurons=neurons(m))
    stream = m.capture(t, f"resid_post.{m.shape.n_layers - 1}")[f"resid_post.{m.shape.n_layers - 1}@-1"]
    assert torch.equal(parts.total, stream)
    assert gap(parts.contribution.sum(1), stream) < 1e-5
    logits = uncapped(m, m.run_last(t))
    one, rest = logit_contributions(m, parts, TOKENS)
    assert gap(one.sum(1) + rest, logits[ROWS, TOKENS]) < 1e-5
    two, rest = logit_contributions(m, parts, TOKENS, FOILS)
    assert gap(two.sum(1) + rest, logits[ROWS, TOKENS] - logits[ROWS, FOILS]) < 1e-5


@pytest.mark.parametrize("name", widely(CAUSAL))
def test_components_are_what_was_captured_under_their_names(name):
    m = model(name)
    parts = decompose(m, IDS, position=3)
    names, acts = parts.labels["component"], m.capture(IDS, ["head_out", "mlp_out", "attn_out"])
    part = dict(zip(names, parts.contribution.unbind(1), strict=True))
    for i in range(m.shape.n_layers):
        assert gap(part[f"mlp_out.{i}"], acts[f"mlp_out.{i}@3"]) < 1e-6
        heads = torch.stack([part[f"head_out.{i}.{h}"] for h in range(m.shape.n_heads)], dim=1)
        assert gap(heads.sum(1) + part[f"attn_bias.{i}"], acts[f"attn_out.{i}@3"]) < 1e-5
        if not m.family.ln1_post:
            assert gap(heads, acts[f"head_out.{i}@3"] * m.anatomy.multiplier) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2", "olmo2", "granite", "falcon_7b", "cohere"])
def test_shares_without_vectors_are_the_same_shares(name):
    m = model(name)
    parts = decompose(m, IDS, neurons=neurons(m))
    expected, rest = logit_contributions(m, parts, TOKENS, FOILS)
    names, shares, offset = logit_shares(m, last_stream(m, IDS, neurons=True), TOKENS[None], FOILS[None])
    assert names == parts.labels["component"]
    assert gap(shares[0], expected) < 1e-5
    assert gap(offset[0] + 1, rest + 1) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2", "mistral_window"])
def test_padding_moves_no_component(name):
    m = model(name)
    for t in PADDED.values():
        for row, prompt in enumerate((LONG, SHORT)):
            single = decompose(m, batch([prompt]))
            assert gap(decompose(m, t).contribution[row], single.contribution[0]) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "phi3"])
def test_an_ablated_head_contributes_nothing(name):
    m = model(name)
    parts = decompose(m, IDS, edits=[Ablate("z.1.2")])
    at = parts.labels["component"].index("head_out.1.2")
    assert not parts.contribution[:, at].any()
    assert gap(parts.contribution.sum(1), parts.total) < 1e-5


def test_a_decomposition_is_a_result_with_its_record():
    m = model("gpt2")
    parts = decompose(m, IDS)
    assert parts.record["model"]["weights"] == m.fingerprint()
    assert parts.sizes() == {"batch": 2, "component": 2 + 3 * (4 + 1 + 1), "d_model": 32}
    assert parts.select(component="mlp_out.1").contribution.shape == (2, 1, 32)


def test_a_stream_that_is_normed_after_additions_is_refused():
    with pytest.raises(Refused, match="normed after every addition"):
        decompose(model("bert"), IDS)
