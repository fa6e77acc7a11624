"""State-space models: what their taps show, what edits there do, and that everything around stays as it was."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import transformers as tf
from torch.nn import functional

from cutaway.core.address import parse
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.core.sites import BY_NAME
from cutaway.models.access import attention
from cutaway.models.access import state_space as scan
from cutaway.models.anatomy.residual import decompose, logit_contributions
from cutaway.models.edits.library import Ablate, Add, Freeze, Replace, Scale
from cutaway.models.generate import generated_ids
from cutaway.models.model import Model
from cutaway.models.self_check import disabled_sites, self_check
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import batch
from tests.models.common import IDS, LONG, PADDED, SHORT, bare, gap, noise, sites
from tests.models.common import metric as smooth
from tests.models.test_inert import Fails, state
from tests.models.tiny import STATE_SPACE, build

NAMES = list(STATE_SPACE)
GENERATIONS = NAMES[:2]  # the third has the functions of the first
ATTENTION = ["attn_in", "q", "k", "v", "scores", "pattern", "z", "head_out", "attn_out", "resid_mid", "mlp_in",
             "mlp_pre", "mlp_post", "mlp_out", "ln2.scale", "pos_embed"]  # fmt: skip


@cache
def model(name, dtype=torch.float32):
    hf = build(name, dtype=dtype)
    hf.requires_grad_(False)
    return Model(hf, name=name)


def place(m, site, layer=1):
    """The address of a site in a middle layer."""
    return f"{site}.{layer}" if BY_NAME[site].scope == "layer" else site


def inner(m):
    """The sites with their addresses in a middle layer, logits left out."""
    return {s: place(m, s) for s in sites(m, "logits")}


def push(m, address, seed=0):
    """A step of the size of what lies at an address, the same at every position and prompt."""
    x = m.capture(IDS, address)[address]
    return noise(1, *x.shape[2:], seed=seed)[0].abs() * x.abs().mean()


def by_hand(m, layer=1):
    """x, B, C, Δ and the states of a layer, recomputed from its weights and its input; the second generation's too."""
    mixer, s = m.hf.backbone.layers[layer].mixer, m.shape
    with torch.no_grad():
        out = mixer.in_proj(m.capture(IDS, f"ssm.in.{layer}")[f"ssm.in.{layer}"])
        first = hasattr(mixer, "x_proj")
        taken = out[..., : s.d_inner] if first else out[..., s.d_inner : -s.n_ssm_heads]
        conv = functional.conv1d(
            taken.transpose(1, 2), mixer.conv1d.weight, mixer.conv1d.bias, padding=3, groups=taken.shape[-1]
        )
        conv = functional.silu(conv[..., : IDS.ids.shape[1]]).transpose(1, 2)
        if first:
            rank, n = mixer.time_step_rank, s.d_state
            dt, b, c = mixer.x_proj(conv).split([rank, n, n], -1)
            if hasattr(mixer, "dt_layernorm"):
                dt, b, c = mixer.dt_layernorm(dt), mixer.b_layernorm(b), mixer.c_layernorm(c)
            dt, u, b, c = functional.softplus(mixer.dt_proj(dt)), conv, b[:, :, None], c[:, :, None]
        else:
            u, b, c = conv.split([s.d_inner, *[s.n_groups * s.d_state] * 2], -1)
            b, c = (t.unflatten(-1, (s.n_groups, s.d_state)) for t in (b, c))
            dt = functional.softplus(out[..., -s.n_ssm_heads :] + mixer.dt_bias)
        size = dt.repeat_interleave(s.d_inner // s.n_ssm_heads, 2)[..., None]
        rate = -mixer.A_log.exp().reshape(s.n_ssm_heads, -1).repeat_interleave(s.d_inner // s.n_ssm_heads, 0)
        write = b.repeat_interleave(s.d_inner // s.n_groups, 2)
        h, states = torch.zeros(2, s.d_inner, s.d_state), []
        for t in range(IDS.ids.shape[1]):
            h = (rate * size[:, t]).exp() * h + size[:, t] * write[:, t] * u[:, t, :, None]
            states.append(h)
    return {"ssm.conv": u, "ssm.dt": dt, "ssm.B": b, "ssm.C": c, "ssm.state": torch.stack(states, 1)}


# --- reading


@pytest.mark.parametrize("name", NAMES)
def test_reading_changes_no_bit_and_every_tap_fires(name):
    m = model(name)
    here = sites(m)
    assert {s for s in BY_NAME if s.startswith("ssm.")} <= set(here)
    assert not set(ATTENTION) & set(here)
    acts = m.capture(IDS, here)
    assert torch.equal(m.run(IDS), bare(m.hf))
    assert torch.equal(acts["logits"], bare(m.hf))
    for s in here:
        assert torch.equal(m.capture(IDS, [s, "logits"])["logits"], bare(m.hf)), s


@pytest.mark.parametrize("name", NAMES)
def test_activations_equal_their_definition(name):
    m = model(name)
    for site, want in by_hand(m).items():
        assert gap(m.capture(IDS, f"{site}.1")[f"{site}.1"], want) < 1e-5, site


@pytest.mark.parametrize("name", NAMES)
def test_places_of_a_layer_follow_from_each_other(name):
    m = model(name)
    a = m.capture(IDS, sites(m))
    assert torch.equal(a["resid_pre"] + a["ssm.out"], a["resid_post"])
    assert torch.equal(a["embed"], a["resid_pre.0"])
    for i in range(m.shape.n_layers):
        mixer = m.hf.backbone.layers[i].mixer
        y, gate, post = (a[f"ssm.{s}.{i}"] for s in ("y", "gate", "post"))
        gated = mixer.norm(y, gate) if hasattr(mixer, "norm") else y * functional.silu(gate)
        assert torch.equal(gated, post)
        assert torch.equal(mixer.out_proj(post), a[f"ssm.out.{i}"])
        wide = a[f"ssm.C.{i}"].repeat_interleave(m.shape.d_inner // m.shape.n_groups, 2)
        skip = a[f"ssm.conv.{i}"] * mixer.D.repeat_interleave(m.shape.d_inner // len(mixer.D))
        assert gap((a[f"ssm.state.{i}"] * wide).sum(-1) + skip, y) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_residual_stream_decomposes(name):
    m, tokens = model(name), torch.tensor([3, 4])
    parts = decompose(m, IDS)
    assert parts.labels["component"] == ["embed", "ssm.out.0", "ssm.out.1", "ssm.out.2"]
    assert gap(parts.contribution.sum(1), parts.total) < 1e-6
    shares, rest = logit_contributions(m, parts, tokens)
    assert gap(shares.sum(1) + rest, m.run_last(IDS)[torch.arange(2), tokens]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", GENERATIONS)
def test_the_self_check_holds_in_every_precision(name, dtype):
    m = model(name, dtype)
    assert disabled_sites(self_check(m)) == {}
    assert torch.equal(m.capture(IDS, sites(m))["logits"], bare(m.hf))
    assert {getattr(b.mixer, "chunk_size", 5) for b in m.hf.backbone.layers} == {5}  # shorter during the check


# --- editing


@pytest.mark.parametrize("name", NAMES)
def test_edits_hold_what_they_put_and_change_what_follows(name):
    m = model(name)
    here, there, plain = (m.capture(t, sites(m)) for t in (IDS, batch([LONG[::-1], [41, 42, 43, 44, 45, 46, 47]]), IDS))
    assert gap(m.run(IDS, [Freeze(a, here) for s in sites(m) for a in m.places(s)]), plain["logits"]) < 1e-5
    for site, where in inner(m).items():
        held = m.capture(IDS, [where, "logits"], Freeze(where, there))
        assert torch.equal(held[where], there[where]), site
        assert gap(held["logits"], plain["logits"]) > 1e-6, site
        assert torch.equal(m.capture(IDS, where, Freeze(where, there), logits=False)[where], there[where]), site


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_of_the_convolution_is_what_convolving_otherwise_gives(name):
    """Step sizes, B, C and what the states take in follow, which a hook before `x_proj` would not bring about."""
    m = model(name)
    d = push(m, "ssm.conv.1")
    changed = copy.deepcopy(m.hf)
    mixer = changed.backbone.layers[1].mixer
    plain = scan._namespace(type(mixer))["causal_conv1d_fn"]
    with pytest.MonkeyPatch.context() as patch:

        def shifted(x, weight, *rest, **kw):
            y = plain(x, weight, *rest, **kw).clone()
            if weight.data_ptr() == mixer.conv1d.weight.data_ptr():
                y[:, : len(d)] += d[:, None]
            return y

        patch.setitem(scan._namespace(type(mixer)), "causal_conv1d_fn", shifted)
        want = bare(changed)
    assert gap(m.run(IDS, Add("ssm.conv.1", d)), want) < 1e-6
    assert gap(want, bare(m.hf)) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_edits_of_weights_and_of_places_agree(name):
    """Δ, B, C, gate and D by their weights: an edit of the place is the same as the changed layer."""
    m = model(name)
    s, first = m.shape, hasattr(m.hf.backbone.layers[1].mixer, "x_proj")

    def rewritten(change):
        hf = copy.deepcopy(m.hf)
        change(hf.backbone.layers[1].mixer)
        return bare(hf)

    def step(mixer):
        (mixer.dt_proj.bias if first else mixer.dt_bias).add_(0.7)

    now = m.capture(IDS, "ssm.dt.1")["ssm.dt.1"]
    wider = functional.softplus(now.expm1().log() + 0.7)
    assert gap(m.run(IDS, Replace("ssm.dt.1", wider)), rewritten(step)) < 1e-4

    def silent(mixer):
        mixer.in_proj.weight[s.d_inner :][: s.d_inner].zero_() if first else mixer.in_proj.weight[: s.d_inner].zero_()

    assert gap(m.run(IDS, Ablate("ssm.gate.1")), rewritten(silent)) < 1e-6
    assert gap(m.run(IDS, Ablate("ssm.out.1")), rewritten(lambda x: x.out_proj.weight.zero_())) < 1e-6
    skip = m.run(IDS, Ablate("ssm.state.1"))
    assert gap(m.run(IDS, Ablate("ssm.C.1")), skip) < 1e-5
    assert gap(m.run(IDS, Ablate("ssm.B.1")), skip) < 1e-5
    assert gap(skip, rewritten(lambda x: x.A_log.fill_(-30.0))) > 1e-3  # forgetting nothing is another thing


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_is_moved_decays_on(name):
    m, made = model(name), by_hand(model(name))
    s, mixer = m.shape, m.hf.backbone.layers[1].mixer
    per = s.d_inner // s.n_ssm_heads
    rate = -mixer.A_log.detach().exp().reshape(s.n_ssm_heads, -1).repeat_interleave(per, 0)
    kept = (rate * made["ssm.dt"].repeat_interleave(per, 2)[..., None]).exp()
    d = push(m, "ssm.state.1")
    got = m.capture(IDS, ["ssm.state.1", "ssm.y.1"], [Add("ssm.state.1@2", d), Scale("ssm.state.1@4", 0.5)])
    want = made["ssm.state"].clone()
    want[:, 2] += d
    for t in range(3, want.shape[1]):
        want[:, t] = made["ssm.state"][:, t] + kept[:, t] * (want[:, t - 1] - made["ssm.state"][:, t - 1])
        want[:, t] *= 0.5 if t == 4 else 1.0
    assert gap(got["ssm.state.1"], want) < 1e-5
    read = made["ssm.C"].repeat_interleave(s.d_inner // s.n_groups, 2)
    plain = m.capture(IDS, "ssm.y.1")["ssm.y.1"]
    assert gap(got["ssm.y.1"] - plain, ((want - made["ssm.state"]) * read).sum(-1)) < 1e-4
    assert torch.equal(got["ssm.y.1"][:, :2], plain[:, :2])


def test_nested_edits_of_states_are_made_in_order_at_every_position():
    m = model("mamba2")
    one, two = Scale("ssm.state.1", 0.5), Add("ssm.state.1@3", push(m, "ssm.state.1"))
    together = m.capture(IDS, ["ssm.state.1", "logits"], [one, two])
    with m.edited(one), m.edited(two):
        for logits in (True, False):
            inside = m.capture(IDS, "ssm.state.1", logits=logits)
            assert gap(inside["ssm.state.1"], together["ssm.state.1"]) < 1e-6
        assert gap(m.run(IDS), together["logits"]) < 1e-6
    assert gap(m.run(IDS, [two, one]), together["logits"]) > 1e-5


@pytest.mark.parametrize("name", GENERATIONS)
def test_channels_are_addressed(name):
    m = model(name)
    for where in ("ssm.y.1.3", "ssm.conv.1.63", "ssm.state.1.5@2", "ssm.dt.1.7@-1", "ssm.post.0.0"):
        x = m.capture(IDS, where)[where]
        changed = m.capture(IDS, str(parse(where).place), Scale(where, 2.0))
        assert gap(changed[where], 2 * x) < 1e-6 or "state" in where
        assert gap(m.run(IDS, Scale(where, 2.0)), m.run(IDS)) > 1e-7
    with pytest.raises(Refused, match="outside this model"):
        m.run(IDS, Ablate("ssm.y.1.64"))


# --- padding, generation, gradients, sweeps


@pytest.mark.parametrize("name", GENERATIONS)
def test_padding_on_either_side_is_never_read(name):
    m = model(name)
    single = [m.run_last(batch([row]))[0] for row in (LONG, SHORT)]
    for t in PADDED.values():
        assert gap(m.run_last(t), torch.stack(single)) < 1e-5
    for where in inner(m).values():
        edits = [Add(where + at, push(m, where, n)) for n, at in enumerate(("@1", "@-1", ""))]
        alone = torch.stack([m.run_last(batch([row]), edits)[0] for row in (LONG, SHORT)])
        assert gap(alone, torch.stack(single)) > 1e-6
        for t in PADDED.values():
            assert gap(m.run_last(t, edits), alone) < 1e-5, (where, t.side)


def test_padding_that_a_bias_would_fill_is_refused():
    kind, arguments = STATE_SPACE["mamba2"]
    m = Model(tf.AutoModelForCausalLM.from_config(getattr(tf, kind)(**arguments, use_bias=True)).eval())
    m.hf.requires_grad_(False)
    m.hf.backbone.layers[0].mixer.in_proj.bias.fill_(0.5)
    single = torch.stack([m.run_last(batch([row]))[0] for row in (LONG, SHORT)])
    assert gap(m.run_last(PADDED["right"]), single) < 1e-5
    for call in (m.run_last, m.run, lambda t: m.generate(t, 2)):
        with pytest.raises(Refused, match="bias"):
            call(PADDED["left"])
    left = m.hf(PADDED["left"].ids, attention_mask=PADDED["left"].mask.long()).logits[:, -1]
    assert gap(left[1], single[1]) > 1e-4  # which is what transformers itself would do
    assert len(m.generate(batch([LONG]), 2)) == 1


@pytest.mark.parametrize("name", GENERATIONS)
def test_generation_with_states_equals_whole_forwards(name):
    m, t = model(name), batch([LONG, SHORT], side="left")
    options = {"eos_token_id": [999]}
    own = m.hf.generate(
        t.ids, attention_mask=t.mask.long(), max_new_tokens=2, do_sample=False, pad_token_id=0, **options
    )
    assert torch.equal(generated_ids(m, t, 2, [], options), own[:, t.ids.shape[1] :])
    for where in inner(m).values():
        last = 0.5 if where.startswith("ssm.dt") else -2.0  # with a step below zero the states grow without end
        edits = [Scale(where, 3.0), Add(where + "@1", push(m, where)), Scale(where + "@-1", last)]
        cached = generated_ids(m, t, 2, edits, options)
        assert torch.equal(cached, generated_ids(m, t, 2, edits, {**options, "use_cache": False})), where


@pytest.mark.parametrize("name", GENERATIONS)
def test_gradients_equal_differences(name):
    m = model(name, torch.float64)
    here = list(inner(m).values())
    _, slopes, given = m.gradients(IDS, here, smooth)
    plain = m.capture(IDS, here)
    for where in here:
        assert gap(given[where], plain[where]) < 1e-6
        g = slopes[where]
        d = push(m, where, seed=3).double()
        size = 2e-3
        for p in (6,) if where == "final.scale" else (2,):
            up, down = (smooth(m.run_last(IDS, Add(f"{where}@{p}", d, c))).double() for c in (size, -size))
            want, got = (up - down) / (2 * size), (g[:, p] * d).reshape(2, -1).sum(1)
            # Logits are float32 whatever the model is, so that differences carry their rounding.
            floor = 2e-6 * float(m.run_last(IDS).abs().max()) / size
            assert float((got - want).abs().max()) < 2e-2 * float(want.abs().max()) + floor, (where, p)


@pytest.mark.parametrize("name", GENERATIONS)
def test_sweeps_equal_single_runs(name):
    m = model(name)
    places = [place(m, s, layer) for layer, s in zip((0, 2) * 8, inner(m), strict=True)]
    variants = [[Add(a + ("@1", "@-1", "")[n % 3], push(m, a))] for n, a in enumerate(places)]
    variants += [[Scale("ssm.y.0.3", 2.0), Ablate("ssm.state.1@2")], [Scale("logits", 2.0)], []]
    for t, base in ((IDS, [Scale("ssm.gate.0", 0.5)]), (IDS, ()), (PADDED["left"], ())):
        with counting() as cost:
            got = sweep(m, t, variants, lambda logits, prompt: smooth(logits), base=base)
        want = torch.stack([smooth(m.run_last(t, [*base, *v])) for v in variants])
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5
        assert cost.forwards < 0.9 * 2 * len(variants)  # layers before an edit are not run again


# --- refusals and inertness


@pytest.mark.parametrize("name", NAMES)
def test_what_attention_has_is_refused(name):
    m = model(name)
    for site in ATTENTION:
        with pytest.raises(Refused, match=f"this {m.family.name} model has no such place"):
            m.capture(IDS, place(m, site))
    for where in ("z.0.1", "pattern.*.*", "mlp_post.1.2"):
        with pytest.raises(Refused, match=r"this model has no (head|neuron)"):
            m.capture(IDS, where)
    for read in (m.weights.q, m.weights.o, m.weights.mlp_out):
        with pytest.raises(Refused, match="none there"):
            read[0]
    assert "heads" not in repr(m)


@pytest.mark.parametrize("name", NAMES)
def test_a_tap_that_does_not_fire_is_refused(name, monkeypatch):
    """A library version that calls its functions by other names is noticed."""
    m = model(name)
    names = scan._namespace(type(m.hf.backbone.layers[0].mixer))
    known = [n for n in scan._HANDLERS if n in names]
    assert len(known) == 4
    monkeypatch.setattr(scan, "_HANDLERS", {})
    for site in scan.SITES:
        with pytest.raises(Refused, match="never passed there"):
            m.capture(IDS, f"{site}.1")
    assert disabled_sites(self_check(m)).keys() == scan.SITES


@pytest.mark.parametrize("name", GENERATIONS)
def test_everything_is_left_as_it_was(name):
    m, other = model(name), build(name, seed=5)
    names = scan._namespace(type(m.hf.backbone.layers[0].mixer))
    functions = {n: names[n] for n in scan._HANDLERS if n in names}
    before, plain, elsewhere = state(m.hf), bare(m.hf), bare(other)
    for error in (ValueError("own"), KeyboardInterrupt()):
        for site in sites(m, "logits"):
            with pytest.raises(type(error)):
                m.run(IDS, [Scale("ssm.conv.0", 2.0), Fails(place(m, site), error)])
    with m.edited(*(Scale(f"{s}.1", 0.5) for s in scan.SITES)):
        assert torch.equal(bare(other), elsewhere)
        assert not torch.equal(bare(m.hf), plain)
        assert all(names[n] is not f for n, f in functions.items())
    m.gradients(IDS, "ssm.state.1", smooth)
    assert state(m.hf) == before
    assert all(names[n] is f for n, f in functions.items())
    assert not scan._INSTALLED
    assert not attention._WATCHED
    assert torch.equal(bare(m.hf), plain)


def test_full_sizes_on_the_meta_device():
    full = {"MambaConfig": ({"hidden_size": 2560, "num_hidden_layers": 64}, (64, 2560, 5120, 16, 5120, 1)),
            "Mamba2Config": ({"hidden_size": 2560, "num_heads": 80, "n_groups": 1, "num_hidden_layers": 64},
                             (64, 2560, 5120, 128, 80, 1))}  # fmt: skip
    for kind, (arguments, shape) in full.items():
        with torch.device("meta"):
            m = Model(tf.AutoModelForCausalLM.from_config(getattr(tf, kind)(**arguments)))
        s = m.shape
        assert (s.n_layers, s.d_model, s.d_inner, s.d_state, s.n_ssm_heads, s.n_groups) == shape
        assert set(sites(m)) == set(sites(model("mamba")))
        assert m.anatomy.widest(16) >= 2 * s.d_inner * s.d_state
