"""The cache's methods against TransformerLens 3.9's values, and against the run that they take apart."""

import pytest
import torch

from bench.compat import helpers
from cutaway.compat.transformer_lens import ActivationCache
from cutaway.compat.transformer_lens.utils import Mismatch
from tests.compat.helpers import REFERENCE, model, same


@pytest.mark.parametrize("name", [*helpers.SUBJECTS, *helpers.NATIVE])
def test_every_method_equals_transformer_lens(name):
    same(helpers.caches(model(name)), REFERENCE[f"cache of {name}"])


def test_components_sum_to_the_stream_that_they_take_apart():
    m = model("gpt2")
    logits, cache = m.run_with_cache(helpers.CLEAN)
    stack, labels = cache.get_full_resid_decomposition(apply_ln=True, return_labels=True)
    torch.testing.assert_close(stack.sum(0) @ m.W_U + m.b_U, logits, atol=1e-4, rtol=1e-4)
    assert len(labels) == len(stack) == 2 * 4 + 2 * 64 + 3
    half = cache.get_full_resid_decomposition(1, mlp_input=True, expand_neurons=False)
    torch.testing.assert_close(half.sum(0), cache["resid_mid", 1], atol=1e-4, rtol=1e-4)
    answers, foils = torch.tensor([3, 4]), torch.tensor([5, 6])
    found = cache.logit_attrs(cache.decompose_resid(pos_slice=-1), answers, foils, pos_slice=-1)
    own = (logits - m.b_U)[range(2), -1]
    torch.testing.assert_close(found.sum(0), own[range(2), answers] - own[range(2), foils], atol=1e-4, rtol=1e-4)


def test_projecting_is_the_same_as_projecting_afterwards():
    m, g = model("gpt2"), torch.Generator().manual_seed(1)
    _, cache = m.run_with_cache(helpers.CLEAN)
    line, plane = torch.randn(16, generator=g), torch.randn(16, 3, generator=g)
    for onto in (line, plane):
        for norm in (False, True):
            whole = cache.get_full_resid_decomposition(1, mlp_input=True, apply_ln=norm) @ onto
            found = cache.get_full_resid_decomposition(1, mlp_input=True, apply_ln=norm, project_output_onto=onto)
            torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
        one = cache.get_neuron_results(1, 5, -1) @ onto
        torch.testing.assert_close(cache.get_neuron_results(1, 5, -1, onto), one, atol=1e-5, rtol=1e-5)


def test_keys_are_found_in_every_form():
    _, cache = model("gpt2").run_with_cache(helpers.CLEAN)
    forms = [("q", 1), ("q", -1), ("q", 1, "attn"), "q1", "blocks.1.attn.hook_q"]
    assert all(cache[key] is cache[forms[0]] for key in forms)
    assert cache["embed"] is cache["hook_embed"]
    assert cache["scale", None] is cache["ln_final.hook_scale"]
    assert cache["normalized", 0, "ln2"] is cache["blocks.0.ln2.hook_normalized"]
    assert len(cache) == len(list(cache)) == len(cache.keys()) == len(cache.values()) == len(dict(cache.items()))
    with pytest.raises(KeyError):
        cache["nothing", 1]


def test_the_batch_axis_comes_off_once(caplog):
    m = model("gpt2")
    _, cache = m.run_with_cache(helpers.CLEAN)
    with pytest.raises(Mismatch, match="2 prompts"):
        cache.remove_batch_dim()
    one = cache.apply_slice_to_batch_dim([1]).remove_batch_dim()
    assert not one.has_batch_dim
    assert torch.equal(one["resid_pre", 1], cache["resid_pre", 1][1])
    one.remove_batch_dim()
    assert "already" in caplog.text
    with pytest.raises(Mismatch, match="no batch axis"):
        one.apply_slice_to_batch_dim(0)
    _, without = m.run_with_cache(helpers.CLEAN[1:], remove_batch_dim=True)
    torch.testing.assert_close(without["z", 1], one["z", 1])
    torch.testing.assert_close(without.accumulated_resid(apply_ln=True)[-1], one.apply_ln_to_stack(
        one.accumulated_resid()[-1:], has_batch_dim=False)[0])  # fmt: skip


def test_autodiff_is_switched_in_the_whole_process():
    cache = ActivationCache({}, model("gpt2"))
    try:
        cache.toggle_autodiff(False)
        assert not torch.is_grad_enabled()
    finally:
        cache.toggle_autodiff(True)
    assert torch.is_grad_enabled()
