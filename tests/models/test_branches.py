"""The inputs of attention's branches: what each head's queries, keys and values read, apart from each other."""

import pytest
import torch

import cutaway as ca
from cutaway.models.edits.library import Ablate, Add, Replace
from tests.models.tiny import build

IDS = torch.tensor([[5, 9, 2, 11, 7, 3]])
LETTERS = [("q", "head"), ("k", "kv_head"), ("v", "kv_head")]


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox_parallel", "llama_gqa", "phi3", "falcon_40b", "qwen3"])
def model(request):
    return ca.load(build(request.param))


def by_hand(x, w, b):
    return torch.einsum("bpd,hde->bphe", x, w) + b


def test_reads_are_attn_in_for_every_head(model):
    acts = model.capture(IDS, ["attn_in.1", "q_in.1", "k_in.1", "v_in.1"])
    for letter, axis in LETTERS:
        n = model.shape.n_heads if axis == "head" else model.shape.n_kv_heads
        got = acts[f"{letter}_in.1"]
        assert got.shape == (1, 6, n, model.shape.d_model)
        assert torch.equal(got, acts["attn_in.1"][:, :, None].expand_as(got))


def test_a_written_input_goes_through_its_head_alone(model):
    """v_in of one head at one position, against the weights by hand; the other heads keep their bits."""
    w, last = model.weights, model.shape.n_kv_heads - 1
    acts = model.capture(IDS, ["attn_in.1", "v.1", "q.1", "k.1"])
    new = torch.randn(model.shape.d_model, generator=torch.Generator().manual_seed(0))
    edit = Replace(f"v_in.1.{last}@2", new)
    got = model.capture(IDS, ["v.1", "q.1", "k.1", f"v_in.1.{last}@2"], [edit])
    want = acts["v.1"].clone()
    want[:, 2, last] = by_hand(new[None, None], w.v[1], w.v_bias[1])[0, 0, last]
    torch.testing.assert_close(got["v.1"], want, atol=2e-6, rtol=1e-5)
    assert torch.equal(got["q.1"], acts["q.1"])
    assert torch.equal(got["k.1"], acts["k.1"])
    assert torch.equal(got[f"v_in.1.{last}@2"], new[None])
    untouched = [h for h in range(last + 1) if h != last]
    assert torch.equal(got["v.1"][:, :, untouched], acts["v.1"][:, :, untouched])


def test_all_branches_together_are_attn_in(model):
    d = torch.randn(model.shape.d_model, generator=torch.Generator().manual_seed(1))
    whole = model.run(IDS, [Add("attn_in.0@1", d)])
    if model.anatomy.parallel and model.anatomy.part(0, "ln2") is None:  # there the MLP reads a tensor of its own
        torch.testing.assert_close(
            model.capture(IDS, "z.0", [Add("attn_in.0@1", d)])["z.0"],
            model.capture(IDS, "z.0", [Add(f"{s}_in.0@1", d) for s, _ in LETTERS])["z.0"], atol=2e-6, rtol=1e-5,
        )  # fmt: skip
        return
    parts = model.run(IDS, [Add(f"{s}_in.0@1", d) for s, _ in LETTERS])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_gradients_of_the_branches_sum_to_that_of_attn_in(model):
    """Each branch has its own gradient: by hand, that of its head's output through the transposed weights."""
    sites = ["attn_in.1", "q_in.1", "k_in.1", "v_in.1", "v.1"]
    _, grads, _ = model.gradients(IDS, sites, lambda logits: logits[:, 3])
    parts = sum(grads[f"{s}_in.1"].sum(2) for s, _ in LETTERS)
    torch.testing.assert_close(parts, grads["attn_in.1"], atol=1e-6, rtol=1e-4)
    by_weights = torch.einsum("bphe,hde->bphd", grads["v.1"], model.weights.v[1])
    torch.testing.assert_close(grads["v_in.1"], by_weights, atol=1e-6, rtol=1e-4)


def test_edits_of_branches_sweep_like_single_runs(model):
    from cutaway.models.sweep.executor import sweep

    tokens = model.tokens(IDS)
    variants = [[Ablate(f"{s}_in.{i}.0@{p}")] for s, _ in LETTERS for i in (0, 1) for p in (1, -1)]
    got = sweep(model, tokens, variants, lambda logits, _: logits[:, 3])
    want = torch.stack([model.run_last(tokens, v)[:, 3] for v in variants])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
