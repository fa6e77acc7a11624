"""Hooks, partial runs, padding, caches of keys and values, and tokens of bridged and native models."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import cutaway as ca
from bench.compat import hook_points
from cutaway.compat.transformer_lens import (
    HookedTransformer,
    HookedTransformerConfig,
    HookedTransformerKeyValueCache,
    TransformerBridge,
    weight_processing,
)
from cutaway.core.refuse import Refused

IDS = torch.tensor([[0, 5, 9, 31, 5, 9], [0, 1, 2, 3, 4, 5]])
LLAMA = "meta-llama/Llama-3.2-1B"


def made(kind: str) -> Any:
    if kind == "native":
        return HookedTransformer(HookedTransformerConfig.from_dict(hook_points.native("standard")))
    return HookedTransformer.from_pretrained(kind, hf_model=hook_points.subject(kind))


@pytest.fixture(params=["native", "gpt2", LLAMA])
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def test_hooks_follow_each_other_and_replace_what_they_return(model):
    seen = list[float]()

    def add(x: Tensor, hook: Any, much: float) -> Tensor | None:
        seen.append(float(x.detach()[0, 0, 0, 0]))
        return x + much if much else None

    z, name = model.run_with_cache(IDS)[1]["z", 1], "blocks.1.attn.hook_z"
    out = model.run_with_hooks(IDS, fwd_hooks=[(name, partial(add, much=1.0)), (name, partial(add, much=0.0))])
    assert seen == pytest.approx([float(z[0, 0, 0, 0]), float(z[0, 0, 0, 0]) + 1])

    def in_place(x: Tensor, hook: Any) -> None:
        x += 1.0

    with torch.no_grad():
        again = model.run_with_hooks(IDS, fwd_hooks=[(lambda n: n == name, in_place)])
    torch.testing.assert_close(again, out.detach())
    assert not torch.allclose(out, model(IDS))


@pytest.mark.parametrize(
    "name",
    ["hook_embed", "blocks.0.ln2.hook_scale", "blocks.1.attn.hook_pattern", "blocks.1.hook_resid_mid",
     "ln_final.hook_normalized", "blocks.0.mlp.hook_post"],
)  # fmt: skip
def test_every_kind_of_place_is_written_in_place_and_by_return(model, name):
    def doubled(x: Tensor, hook: Any) -> Tensor:
        return x * 2

    def double(x: Tensor, hook: Any) -> None:
        x *= 2

    with torch.no_grad():
        one, two = (model.run_with_hooks(IDS, fwd_hooks=[(name, f)]) for f in (doubled, double))
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one, model(IDS), atol=1e-4)


def test_permanent_hooks_contexts_and_levels(model):
    point = model.hook_dict["blocks.0.hook_mlp_out"]
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x * 0, is_permanent=True)
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: hook.ctx.update(seen=x.shape))
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: x + 1)]):
        assert len(point.fwd_hooks) == 3
        model(IDS)
        assert point.ctx["seen"] == (2, 6, 16)
    assert len(point.fwd_hooks) == 2
    model.reset_hooks()
    assert [h.is_permanent for h in point.fwd_hooks] == [True]
    assert point.ctx == {}
    assert float(model.run_with_cache(IDS)[1]["mlp_out", 0].abs().max()) == 0
    model.reset_hooks(including_permanent=True)
    assert not model.list_hooks()


def test_gradients_reach_backward_hooks_and_are_replaced_there(model):
    seen = dict[str, Tensor]()

    def keep(grad: Tensor, hook: Any) -> None:
        seen[hook.name] = grad

    def nothing(grad: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(grad)

    with model.hooks(bwd_hooks=[("blocks.0.hook_resid_pre", keep), ("hook_embed", keep)]):
        model(IDS, return_type="loss").backward()
    assert float(seen["blocks.0.hook_resid_pre"].abs().max()) > 0
    torch.testing.assert_close(seen["blocks.0.hook_resid_pre"], seen["hook_embed"])
    with model.hooks(bwd_hooks=[("blocks.1.hook_resid_pre", nothing), ("blocks.0.hook_resid_pre", keep)]):
        model(IDS, return_type="loss").backward()
    assert float(seen["blocks.0.hook_resid_pre"].abs().max()) == 0


def test_stopping_and_starting_at_a_layer_is_the_whole_run(model):
    whole = model(IDS)
    for layer in (0, 1, -1):
        stream = model(IDS, stop_at_layer=layer)
        torch.testing.assert_close(model(stream, start_at_layer=layer % 2), whole)
        kept = model.run_with_cache(IDS, stop_at_layer=layer, return_type=None)[1]
        assert ("blocks.0.hook_resid_pre" in kept) == (layer != 0)
        assert "ln_final.hook_scale" not in kept
    assert model(IDS, return_type=None) is None


def test_each_call_of_the_norm_before_attention_has_its_own_gradient(model):
    normed, queries = list[Tensor](), list[Tensor]()
    keep = [("blocks.1.ln1.hook_normalized", lambda g, hook: normed.append(g.clone())),
            ("blocks.1.attn.hook_q", lambda g, hook: queries.append(g.clone()))]  # fmt: skip
    with model.hooks(bwd_hooks=keep):
        model(IDS, return_type="loss").backward()
    assert len(normed) == 3
    expected = torch.einsum("bphd,hmd->bpm", queries[0], model.blocks[1].attn.W_Q)
    torch.testing.assert_close(normed[-1], expected * getattr(model.blocks[1].ln1, "w", 1.0))


@pytest.mark.parametrize("kind", ["gpt2", LLAMA])
def test_a_bridged_run_goes_on_with_the_positions_that_a_hook_leaves(kind):
    model, calls = made(kind), list[str]()

    def cut(stream: Tensor, hook: Any) -> Tensor:
        calls.append(hook.name)
        return stream[:, :4] * 2

    rest = model(model(IDS, stop_at_layer=1)[:, :4] * 2, start_at_layer=1)
    for name in ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"):
        torch.testing.assert_close(model.run_with_hooks(IDS, fwd_hooks=[(name, cut)]), rest)
    assert model.run_with_hooks(IDS, fwd_hooks=[(name, cut)], stop_at_layer=1).shape[1] == 4
    assert calls == ["blocks.1.hook_resid_pre", *["blocks.0.hook_resid_post"] * 2]


def test_padding_on_the_left_and_cached_columns_change_nothing(model):
    with torch.no_grad():
        whole = model(IDS)
        padded = torch.cat([torch.full((2, 2), 7), IDS], 1)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]] * 2)
        torch.testing.assert_close(model(padded, attention_mask=mask)[:, 2:], whole, atol=1e-5, rtol=1e-4)
        cache = HookedTransformerKeyValueCache.init_cache(model.cfg, "cpu", 2)
        model(IDS[:, :4], past_kv_cache=cache)
        cache.freeze()
        for _ in range(2):
            torch.testing.assert_close(model(IDS[:, 4:], past_kv_cache=cache), whole[:, 4:], atol=1e-5, rtol=1e-4)
        assert cache[0].past_keys.shape[:2] == (2, 4)
        given = {"max_new_tokens": 2, "do_sample": False, "stop_at_eos": False, "verbose": False}
        new = model.generate(IDS, **given)
        assert torch.equal(new, model.generate(IDS, use_past_kv_cache=False, **given))
        assert torch.equal(new[:, 6], whole[:, -1].argmax(-1))


def test_hooks_that_would_never_fire_are_refused(model):
    def hook(x: Tensor, hook: Any) -> None: ...

    with pytest.raises(Refused, match=r"near: blocks\.0\.hook_resid_pre"):
        model.add_hook("blocks.0.hook_resid_prez", hook)
    with pytest.raises(Refused, match="near"):
        model.run_with_cache(IDS, names_filter=["hook_embeds"])
    with pytest.raises(AssertionError, match="set_use_attn_result"):
        model.run_with_hooks(IDS, fwd_hooks=[("blocks.0.attn.hook_result", hook)])
    model.set_use_attn_result(True)
    result = model.run_with_cache(IDS)[1]["result", 0]
    torch.testing.assert_close(result.sum(2) + model.b_O[0], model.run_with_cache(IDS)[1]["attn_out", 0])


def test_weights_are_loaded_processed_and_trained_under_their_names():
    one, two = made("native"), made("native")
    with torch.no_grad():
        one.blocks[0].ln1.w += 1
        one.W_E.mul_(2)
    state = one.state_dict()
    assert {"embed.W_E", "blocks.0.attn.W_Q", "blocks.1.mlp.b_out", "blocks.0.attn.mask"} <= set(state)
    two.load_and_process_state_dict(state)
    log = partial(torch.log_softmax, dim=-1)
    torch.testing.assert_close(log(one(IDS)), log(two(IDS)))
    assert two.cfg.normalization_type == "LNPre"
    assert float(two.W_E.detach().mean(-1).abs().max()) < 1e-6
    folded = HookedTransformer({**hook_points.native("standard"), "seed": 2})
    folded.load_state_dict(two.state_dict(), strict=False)
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=hook_points.subject("gpt2"))
    raw = bridge(IDS)
    bridge.enable_compatibility_mode()
    torch.testing.assert_close(log(raw), log(bridge(IDS)), atol=1e-4, rtol=1e-4)
    assert bridge.state_dict()["blocks.0.attn.W_Q"].shape == (4, 16, 4)


def test_output_biases_are_centred_once_more_behind_folded_values_bit_for_bit():
    raw = HookedTransformer.from_pretrained_no_processing("gpt2", hf_model=hook_points.subject("gpt2"))
    steps = raw.state_dict()
    for step in ("fold_norms", "centre_writers", "move_value_biases"):
        getattr(weight_processing, step)(steps, raw.cfg)
    name = "blocks.1.attn.b_O"
    expected = steps[name] - steps[name].mean()
    assert torch.equal(made("gpt2").state_dict()[name], expected)
    assert not torch.equal(steps[name], expected)


def test_the_state_dict_of_a_part_is_that_of_the_model_below_its_name(model):
    whole = model.state_dict()
    for name in ("embed", "ln_final", "blocks.1", "blocks.0.attn"):
        part = model.get_submodule(name).state_dict()
        assert part.keys() == {n.removeprefix(f"{name}.") for n in whole if n.startswith(f"{name}.")}
        assert all(torch.equal(part[n], whole[f"{name}.{n}"]) for n in part)


def test_a_model_without_norms_has_none_to_fold():
    model = HookedTransformer({**hook_points.native("attention only"), "device": "cpu"})
    log = partial(torch.log_softmax, dim=-1)
    before = log(model(IDS))
    model.load_and_process_state_dict(model.state_dict())
    torch.testing.assert_close(log(model(IDS)), before)


def test_state_dicts_that_do_not_fit_are_refused():
    native, bridge = made("native"), made("gpt2")
    for model, error in ((native, RuntimeError), (bridge, Refused)):
        state = model.state_dict()
        with pytest.raises(error, match=r"b_Q"):
            model.load_state_dict({n: t for n, t in state.items() if n != "blocks.0.attn.b_Q"})
        with pytest.raises(error, match=r"other\.w"):
            model.load_state_dict({**state, "other.w": state["unembed.b_U"]})
    with pytest.raises(RuntimeError, match=r"ln1\.w"):
        native.load_state_dict({n: t for n, t in native.state_dict().items() if ".ln1." not in n})
    native.load_state_dict({**native.state_dict(), "blocks.0.attn.IGNORE": torch.tensor(-1e5)})
    assert float(native.run_with_cache(IDS)[1]["attn_scores", 0][0, 0, 0, 1]) == -1e5


def test_attention_is_refactored_without_a_change_of_what_is_computed():
    hf = hook_points.subject("gpt2")
    plain, new = (
        HookedTransformer.from_pretrained("gpt2", hf_model=hf, refactor_factored_attn_matrices=on)
        for on in (False, True)
    )
    torch.testing.assert_close(plain(IDS), new(IDS), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain.OV.AB, new.OV.AB, atol=1e-4, rtol=1e-4)
    rotated = new.W_O[0, 0] @ new.W_O[0, 0].T
    torch.testing.assert_close(rotated, torch.eye(4), atol=1e-4, rtol=1e-4)


def test_texts_become_tokens_and_back():
    model = HookedTransformer.from_pretrained("miniworld", hf_model=ca.load("miniworld"))
    text, bos = "the capital of", model.tokenizer.bos_token
    ids = model.to_tokens(text)
    assert model.to_str_tokens(text)[0] == bos
    assert ids[0, 0] == model.tokenizer.bos_token_id
    assert model.to_string(ids[0, 1:]).strip() == text
    assert torch.equal(model.to_tokens(text, prepend_bos=False), ids[:, 1:])
    both = model.to_tokens([text, f"{text} {text}"], padding_side="left")
    assert both[0, 0] == model.tokenizer.pad_token_id
    assert both.shape[0] == 2
    token = model.to_single_str_token(int(ids[0, -1]))
    assert model.get_token_position(int(ids[0, -1]), text) == ids.shape[1] - 1
    assert model.tokens_to_residual_directions(ids[0]).shape == (ids.shape[1], model.cfg.d_model)
    assert model.to_single_token(token) == int(ids[0, -1])
    with pytest.raises(AssertionError, match="single token"):
        model.to_single_token(f"{text} {text}")
    assert model.generate(text, max_new_tokens=2, do_sample=False, verbose=False).strip().startswith(text)


def test_looking_changes_no_bit(model):
    with torch.no_grad():
        pattern = model.run_with_cache(IDS)[1]["pattern", 1]
        alone = model.run_with_cache(IDS, names_filter="blocks.1.attn.hook_pattern")[1]["pattern", 1]
    assert torch.equal(pattern, alone)
