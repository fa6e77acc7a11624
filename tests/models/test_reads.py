"""Reading: nothing changes, and what is read is what transformers computed, at every site of every family."""

import copy

import pytest
import torch
from torch.testing import assert_close

import cutaway as ca
from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models.access.ports import port
from cutaway.models.model import Model
from cutaway.models.tokens import batch
from tests.models.common import (
    ALL,
    CAUSAL,
    FORMED,
    IDS,
    KINDS,
    LONG,
    PADDED,
    SHORT,
    bare,
    by_turns_widely,
    gap,
    model,
    sites,
    widely,
)
from tests.models.tiny import build

HALF = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("name", widely(ALL))
def test_logits_are_bit_equal_bare_and_while_every_site_is_read(name):
    m = model(name)
    plain = bare(m.hf)
    assert torch.equal(m.run(IDS), plain)
    assert torch.equal(m.capture(IDS, sites(m, *FORMED))["logits"], plain)
    assert gap(m.capture(IDS, sites(m))["logits"], plain) < 1e-5


@pytest.mark.parametrize("name", widely(ALL))
def test_under_eager_attention_reading_scores_and_patterns_too_is_bit_equal(name):
    m = model(name, attention="eager")
    plain = bare(m.hf)
    acts = m.capture(IDS, sites(m))
    assert torch.equal(acts["logits"], plain)
    with torch.no_grad():
        shown = m.hf(IDS.ids, output_attentions=True).attentions
    assert torch.equal(acts["pattern"], torch.stack(shown))
    if name != "falcon_alibi":  # transformers' two forms of it differ by a rounding of the distances
        assert gap(model(name).capture(IDS, "pattern")["pattern"], acts["pattern"]) < 1e-5


@pytest.mark.parametrize("name", widely(ALL))
def test_the_stream_is_transformers_hidden_states(name):
    m = model(name)
    with torch.no_grad():
        hidden = m.hf(IDS.ids, output_hidden_states=True).hidden_states
    acts = m.capture(IDS, ["resid_pre", "resid_post"])
    for i in range(m.shape.n_layers):
        assert torch.equal(acts[f"resid_pre.{i}"], hidden[i])
    for i in range(m.shape.n_layers - 1):
        assert torch.equal(acts[f"resid_post.{i}"], hidden[i + 1])


@pytest.mark.parametrize("name", widely(ALL))
def test_nothing_captured_is_written_over_later_in_the_forward(name):
    m, kept, handles = model(name), {}, []
    wanted = [s for s in sites(m, *FORMED, "q", "k", "v") if not s.endswith(".scale")]
    for a in m.places(wanted):
        p = port(m.anatomy, a)

        def before(module, args, kw, a=a, p=p):
            kept[a] = p.read((args[0] if args else kw["hidden_states"]).clone(), None)

        def after(module, args, kw, out, a=a, p=p):
            x, y = args[0] if args else kw.get("hidden_states"), out["logits"] if hasattr(out, "keys") else out
            kept[a] = p.read(x.clone(), (y if isinstance(y, torch.Tensor) else y[0]).clone()).clone()

        hook = p.module.register_forward_hook if p.side == "out" else p.module.register_forward_pre_hook
        handles.append(hook(after if p.side == "out" else before, with_kwargs=True))
    try:
        acts = m.capture(IDS, wanted)
    finally:
        for h in handles:
            h.remove()
    for a, value in kept.items():
        value = value.expand_as(acts[str(a)])  # positions that are the same for every prompt
        assert torch.equal(acts[str(a)], value) or gap(acts[str(a)], value) < 1e-6, a


@pytest.mark.parametrize(("name", "side"), by_turns_widely(ALL))
def test_padding_moves_nothing(name, side):
    m = model(name)
    wanted = sites(m)
    padded = m.capture(PADDED[side], wanted)
    for row, prompt in enumerate((LONG, SHORT)):
        single = m.capture(batch([prompt]), wanted)
        real = PADDED[side].mask[row]
        for a in map(str, single):
            x, one = padded[a][row], single[a][0]
            if a.startswith(FORMED):
                x, one = x[:, real][:, :, real].clamp_min(-1e4), one.clamp_min(-1e4)
            else:
                x = x[real]
            assert gap(x, one) < 2e-5, a
    assert gap(m.run_last(PADDED[side])[1], m.run(batch([SHORT]))[0, -1]) < 1e-5


@pytest.mark.parametrize("name", widely(ALL))
def test_identities(name):
    m = model(name)
    acts = m.capture(IDS, sites(m, "logits"))
    group = m.shape.n_heads // m.shape.n_kv_heads
    values = acts["v"].repeat_interleave(group, dim=3)
    assert gap(torch.einsum("lbhqk,lbkhd->lbqhd", acts["pattern"], values), acts["z"]) < 1e-5
    assert gap(acts["scores"].softmax(-1), acts["pattern"]) < 1e-5
    if m.family.post_norm:
        return
    assert gap(acts["resid_pre"] + acts["attn_out"] + acts["mlp_out"], acts["resid_post"]) < 1e-5
    if "resid_mid" in sites(m):
        assert gap(acts["resid_pre"] + acts["attn_out"], acts["resid_mid"]) < 1e-5
    if "pos_embed" in sites(m):
        assert gap(acts["embed"] + acts["pos_embed"], acts["resid_pre.0"]) < 1e-6
    if not m.family.ln1_post:
        biases = torch.stack([m.weights.o_bias[i] for i in range(m.shape.n_layers)])[:, None, None]
        assert gap((acts["head_out"].sum(3) + biases) * m.anatomy.multiplier, acts["attn_out"]) < 1e-5


@pytest.mark.parametrize("name", widely(CAUSAL))
def test_scales_are_the_divisors_of_the_norms(name):
    m = model(name)
    for ln, stream, read in (("ln1", "resid_pre", "attn_in"), ("ln2", "resid_mid", "mlp_in")):
        if f"{ln}.scale" not in sites(m):
            continue
        stream = stream if stream in sites(m) else "resid_pre"
        acts = m.capture(IDS, [f"{ln}.scale", stream, read])
        for i in range(m.shape.n_layers):
            norm = m.anatomy.norm(m.anatomy.part(i, ln))
            out = norm.linear(acts[f"{stream}.{i}"], acts[f"{ln}.scale.{i}"]) + norm.bias
            assert gap(out, acts[f"{read}.{i}"]) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_router_logits_are_the_gates_map_of_what_the_mlp_reads(name):
    m = model(name)
    acts = m.capture(IDS, ["router", "mlp_in"])
    for i in acts.layers("router"):
        assert gap(acts[f"router.{i}"], acts[f"mlp_in.{i}"] @ m.anatomy.part(i, "router").weight.T) < 1e-5


@pytest.mark.parametrize(("name", "dtype"), [*((n, torch.bfloat16) for n in ALL), *((n, torch.float16) for n in KINDS)])
def test_half_precision(name, dtype):
    m = model(name, dtype)
    assert torch.equal(m.run(IDS), bare(m.hf))
    acts = m.capture(IDS, sites(m))
    assert all(torch.isfinite(acts[a].float().clamp(-1e4, 1e4)).all() for a in acts)
    if not m.family.post_norm:
        total = acts["resid_pre"].float() + acts["attn_out"].float() + acts["mlp_out"].float()
        assert gap(total, acts["resid_post"]) < HALF[dtype]


def test_addresses_select_units_and_positions_on_either_padding_side():
    m = model("llama_gqa")
    for t in PADDED.values():
        acts = m.capture(t, ["z.1.2", "k.1", "pattern.2.3", "mlp_post.0", "resid_pre.0@-1"])
        assert torch.equal(acts["z.1.2"], acts["z.1"][:, :, 2])
        assert torch.equal(acts["k.1.1"], acts["k.1"][:, :, 1])
        assert torch.equal(acts["pattern.2.3"], acts["pattern.2"][:, 3])
        assert torch.equal(
            acts["mlp_post.0.17@-1"], torch.stack([acts["mlp_post.0"][b, c, 17] for b, c in enumerate(t.last)])
        )
        assert torch.equal(acts["resid_pre.0@2"][1], m.capture(batch([SHORT]), "resid_pre.0")["resid_pre.0"][0, 2])
    assert m.capture(IDS, ["z", "resid_post.1"])["z"].shape == (3, 2, 7, 4, 8)


@pytest.mark.parametrize(
    ("name", "asked", "word"),
    [
        ("llama", "z.7", "outside"),
        ("llama", "z.0.4", "outside"),
        ("llama_gqa", "k.0.2", "outside"),
        ("llama", "mlp_post.0.48", "outside"),
        ("llama", "resid_past.0", "no site"),
        ("llama", "pos_embed", "no such place"),
        ("gptj", "resid_mid.0", "no such place"),
        ("gpt2", "mlp_gate", "no such place"),
        ("qwen2_moe", "mlp_post.1", "no such place"),
        ("llama", "z.a", "whole number"),
        ("llama", "pattern.0@3", "no position"),
    ],
)
def test_addresses_outside_the_model_are_refused(name, asked, word):
    with pytest.raises(Refused, match=word):
        model(name).capture(IDS, asked)


def test_a_pattern_over_layers_takes_those_that_have_the_site():
    assert model("qwen2_moe").capture(IDS, "mlp_post").layers("mlp_post") == [0]
    assert model("qwen2_moe").capture(IDS, "router").layers("router") == [1, 2]


def test_positions_beyond_the_shortest_prompt_are_refused():
    with pytest.raises(Refused, match="shortest prompt has 3"):
        model("llama").capture(PADDED["left"], "resid_pre.0")["resid_pre.0@5"]


def test_what_was_not_captured_is_refused():
    acts = model("llama").capture(IDS, "z.1")
    with pytest.raises(Refused, match="not captured"):
        acts["z.2"]
    with pytest.raises(Refused, match="no layer"):
        acts["resid_post"]


@pytest.mark.parametrize("site", ["z.1", "v.1", "pattern.1", "attn_out.1", "mlp_post.1"])
def test_a_tap_that_does_not_fire_is_refused(site):
    m = model("llama")
    lazy = copy.deepcopy(m.hf)
    block = lazy.model.layers[1]
    part = block.mlp if site[:3] == "mlp" else block.self_attn
    part.forward = (lambda x: x) if site[:3] == "mlp" else (lambda hidden_states, **kw: (hidden_states, None))
    broken = type(m)(lazy)
    with pytest.raises(Refused, match="never passed there"):
        broken.capture(IDS, site)
    assert broken.capture(IDS, "z.0")["z.0"].shape == (2, 7, 4, 8)


def test_a_capture_without_unembedding_reads_the_same():
    m = model("gemma2")
    one, two = m.capture(PADDED["left"], "resid_post"), m.capture(PADDED["left"], "resid_post", logits=False)
    assert torch.equal(one["resid_post"], two["resid_post"])


def test_sizes_and_places_agree():
    m = model("llama_gqa")
    assert len(m.places("k.*.*")) == 3 * 2
    assert m.places(["z.1.3@-1"]) == [Address("z", 1, 3, -1)]


def test_what_is_computed_when_looked_at_carries_no_graph_and_no_later_weights():
    hf = build("llama")
    m = Model(hf)
    acts = m.capture(IDS, ["head_out.1", "head_out.2", "ln1.scale.1"])
    assert not acts["head_out.1"].requires_grad
    assert torch.equal(acts["head_out.1"], model("llama").capture(IDS, "head_out.1")["head_out.1"])
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight.mul_(2.0)
    assert torch.equal(acts["head_out.1"], model("llama").capture(IDS, "head_out.1")["head_out.1"])
    with pytest.raises(Refused, match="weights have changed"):
        acts["head_out.2"]
    assert acts["ln1.scale.1"].shape == (2, 7)


def test_activations_are_a_mapping_in_every_way_of_asking():
    acts = model("llama").capture(IDS, ["resid_post", "z.1", "pattern.0"])
    known = ["resid_post.1", "resid_post", "z", "z.1", "z.1.2", "z.1.2@-1", "z.1@0", "pattern.0.3"]
    unknown = ["z.0", "v", "z.1.9", "z.1@7", "z.-1", "z.1.-1", "pattern.0@1", "hook_z", "nonsense", "z.*", 5, None]
    for key in known:
        assert key in acts
        assert torch.equal(acts.get(key), acts[key])
    for key in unknown:
        assert key not in acts
        assert acts.get(key, "none") == "none"
        with pytest.raises(KeyError) as error:
            acts[key]
        assert isinstance(error.value, Refused)
        assert "\n  why: " in str(error.value)
    assert list(acts) == [*(f"resid_post.{i}" for i in range(model("llama").shape.n_layers)), "z.1", "pattern.0"]
    assert acts != dict(acts)
    assert {acts: 1}[acts] == 1


def test_one_prompts_activation_is_a_result_with_its_tokens_and_draws_itself(tmp_path):
    m = model("gpt2")
    prompts = batch([[1, 2, 3, 4], [5, 6]], side="left", pieces=[("a", "b", "a", "c"), (" x", "y")])
    acts = m.capture(prompts, ["pattern.1", "z", "resid_post.0"])
    got = acts.result("pattern.1.2", prompt=1)
    assert (got.grid, got.labels) == (("q_pos", "k_pos"), {"q_pos": ["x", "y"], "k_pos": ["x", "y"]})
    alone = m.capture(torch.tensor([[5, 6]]), "pattern.1.2")["pattern.1.2"][0]
    assert_close(got.activation, alone, rtol=0, atol=2e-7)
    assert acts.result("resid_post.0@-1").grid == ("d_model",)
    stacked = acts.result("z")
    assert (stacked.grid, stacked.labels["layer"]) == (("layer", "position", "head", "d_head"), acts.layers("z"))
    assert stacked.labels["position"] == ["a·0", "b", "a·2", "c"]
    assert torch.equal(ca.open(got.save(tmp_path / "a.safetensors")).activation, got.activation)

    drawn = acts.plot("pattern.1", prompt=1)
    frames = [f for f in drawn.axes if f.get_xlabel() == "key"]
    assert [f.get_title("left") for f in frames] == [f"pattern.1 · head {h}" for h in range(m.shape.n_heads)]
    assert [t.get_text() for t in frames[0].get_yticklabels()] == ["x", "y"]
    with pytest.raises(Refused, match="use 0 to 1"):
        acts.plot("pattern.1", prompt=2)
    with pytest.raises(Refused, match="not captured"):
        acts.plot("pattern.0")


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "mixtral", "mamba", "mamba2"])
def test_a_site_holds_as_many_numbers_per_position_as_are_captured(name):
    m = model(name)
    acts = m.capture(IDS, sites(m))
    for place in map(Address, *zip(*((a.site, a.layer) for a in m.places(sites(m))), strict=True)):
        held = m.anatomy.held(place.row, IDS.ids.shape[1])
        assert acts[str(place)].numel() == IDS.ids.numel() * held, place
