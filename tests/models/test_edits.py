"""Edits as interventions: different ways to make one change agree, and every change reaches what it must."""

import copy

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from cutaway.core.address import parse
from cutaway.core.refuse import Refused
from cutaway.core.sites import BY_NAME
from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.edits.edit import Edit, as_edits, at_places
from cutaway.models.edits.library import Ablate, Add, Freeze, Knockout, Project, Replace, Scale
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import batch
from tests.models.common import (
    ALIBI,
    ALL,
    CAUSAL,
    IDS,
    KINDS,
    LONG,
    PADDED,
    SHORT,
    bare,
    gap,
    model,
    noise,
    sites,
    widely,
)


def test_a_tensor_scales_each_unit_and_each_prompt_by_its_own_factor():
    m = model("llama")
    own = m.capture(IDS, "mlp_post.1")["mlp_post.1"]
    factors = torch.rand(len(IDS), 1, own.shape[-1], generator=torch.Generator().manual_seed(0))
    scaled = m.run(IDS, Scale("mlp_post.1", factors))
    assert torch.equal(scaled, m.run(IDS, Replace("mlp_post.1", own * factors)))
    by_prompt = sweep(m, IDS, [[Scale("mlp_post.1@-1", factors[:, 0])]], lambda logits, _: logits)[0]
    alone = [m.run(IDS.rows([i]), Scale("mlp_post.1@-1", factors[i, 0]))[0, -1] for i in range(len(IDS))]
    assert gap(by_prompt, torch.stack(alone)) < 1e-5


@pytest.mark.parametrize("name", widely(ALL))
def test_a_zero_head_is_one_change_by_z_pattern_head_out_and_values(name):
    m = model(name)
    by_z = m.run(IDS, Ablate("z.1.2"))
    assert gap(by_z, m.run(IDS)) > 1e-4
    assert gap(m.run(IDS, Ablate("pattern.1.2")), by_z) < 1e-5
    assert gap(m.run(IDS, Ablate("head_out.1.2")), by_z) < 1e-5
    assert gap(m.run(IDS, Ablate("v.1")), m.run(IDS, Ablate("z.1"))) < 1e-5
    one_kv = m.run(IDS, Ablate(f"v.1.{m.shape.n_kv_heads - 1}"))
    group = m.shape.n_heads // m.shape.n_kv_heads
    assert gap(one_kv, m.run(IDS, [Ablate(f"z.1.{h}") for h in range(m.shape.n_heads - group, m.shape.n_heads)])) < 1e-5


@pytest.mark.parametrize("name", widely(ALL))
def test_the_middle_stream_reaches_both_branches(name):
    m, d = model(name), noise(32)
    if "resid_mid" not in sites(m):
        pytest.fail(name) if not m.anatomy.parallel else None
        return
    # what attention adds is added to the middle: behind the norm where the stream itself is normed
    add = Add("attn_out.1", d)
    if not m.family.post_norm:
        assert gap(m.run(IDS, Add("resid_mid.1", d)), m.run(IDS, add)) < 1e-5
        return
    before, after = m.capture(IDS, "resid_mid.1")["resid_mid.1"], m.capture(IDS, "resid_mid.1", add)["resid_mid.1"]
    assert gap(after, before) > 1e-3
    assert torch.equal(m.run(IDS, Replace("resid_mid.1", after)), m.run(IDS, add))


@pytest.mark.parametrize("name", widely(ALL))
def test_scores_make_the_pattern(name):
    m, target = model(name), torch.zeros(7, 7)
    target[torch.arange(7), torch.arange(7) // 2] = 1.0
    one_hot = Replace("scores.1", torch.where(target > 0, 0.0, -1e9))
    acts = m.capture(IDS, ["pattern.1", "z.1", "v.1"], one_hot)
    assert torch.equal(acts["pattern.1"], target.expand(2, 4, 7, 7))
    v = acts["v.1"].repeat_interleave(m.shape.n_heads // m.shape.n_kv_heads, dim=2)
    assert gap(acts["z.1"], v[:, torch.arange(7) // 2]) < 1e-6


@pytest.mark.parametrize("name", widely(ALL))
def test_zero_queries_attend_evenly_and_equal_zero_keys(name):
    m = model(name)
    by_q, by_k = (m.capture(IDS, "pattern.1", Ablate(f"{s}.1"))["pattern.1"] for s in "qk")
    assert gap(by_q, by_k) < 1e-6
    if name not in ALIBI:
        seen = by_q > 0
        assert gap(by_q, seen / seen.sum(-1, keepdim=True)) < 1e-6


@pytest.mark.parametrize("name", widely(ALL))
@pytest.mark.parametrize("side", ["left", "right"])
def test_knockout_cuts_exactly_its_edges(name, side):
    m, t = model(name), PADDED[side]
    plain = m.capture(t, "pattern.1")["pattern.1"]
    cut = m.capture(t, "pattern.1", Knockout("pattern.1.3", queries=(2, -1), keys=(1,)))["pattern.1"]
    assert torch.equal(cut[:, :3], plain[:, :3])
    for row, prompt in enumerate((LONG, SHORT)):
        first = int(t.column(0)[row])
        p, c = plain[row, 3, first : first + len(prompt), first : first + len(prompt)], cut[row, 3]
        c = c[first : first + len(prompt), first : first + len(prompt)]
        for q in range(len(prompt)):
            expected = p[q].clone()
            if q in (2, len(prompt) - 1):
                expected[1] = 0.0
                expected /= expected.sum()
            assert gap(c[q], expected) < 1e-5


@pytest.mark.parametrize("name", [*KINDS, "bert"])  # the self-check asks it of every family
def test_every_site_can_be_held_and_its_own_value_changes_nothing(name):
    m, other = model(name), batch([LONG[::-1], [41, 42, 43, 44, 45, 46, 47]])
    here, there, plain = m.capture(IDS, sites(m)), m.capture(other, sites(m)), m.run(IDS)
    writable = [s for s in sites(m) if BY_NAME[s].writable]
    assert gap(m.run(IDS, [Freeze(a, here) for a in m.places(writable)]), plain) < 1e-5
    for place in (str(m.places(s)[-1]) for s in writable):
        held = m.capture(IDS, [place, "logits"], Freeze(place, there))
        assert torch.equal(held[place], there[place]), place
        assert place == "pos_embed" or gap(held["logits"], plain) > 1e-6, place


@pytest.mark.parametrize("name", widely(CAUSAL))
def test_scales_divide(name):
    """Twice the scale halves what a norm hands on (bias aside), twice the final scale halves the logits likewise."""
    m = model(name)
    for ln, read in (("ln1", "attn_in"), ("ln2", "mlp_in")):
        if f"{ln}.scale" in sites(m):
            plain, doubled = (m.capture(IDS, f"{read}.1", e)[f"{read}.1"] for e in ((), Scale(f"{ln}.scale.1", 2.0)))
            b = m.anatomy.norm(m.anatomy.part(1, ln)).bias
            assert gap(doubled - b, (plain - b) / 2) < 1e-5
    if unembedding(m.anatomy).cap is None:
        offset = m.run(IDS, Scale("final.scale", 1e9))
        assert gap(m.run(IDS, Scale("final.scale", 2.0)) - offset, (m.run(IDS) - offset) / 2) < 1e-5


PLACES = ["resid_pre.1", "z.1.2", "v.1", "k.1.0", "q.1.1", "attn_out.1", "ln1.scale.1", "embed", "mlp_out.0"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("position", [1, -1])
def test_edits_at_one_position_are_the_same_on_padded_prompts(name, position):
    m = model(name)
    edits = [Scale(f"{p}@{position}", 1.7) for p in PLACES if parse(p).site in sites(m)]
    single = m.run_last(batch([SHORT]), edits)[0]
    assert gap(single, m.run_last(batch([SHORT]))[0]) > 1e-4
    for t in PADDED.values():
        assert gap(m.run_last(t, edits), torch.stack([m.run_last(batch([LONG]), edits)[0], single])) < 1e-5


@pytest.mark.parametrize("place", PLACES)
def test_an_edit_at_one_position_changes_that_position_only(place):
    m = model("llama_gqa")
    for t in PADDED.values():
        plain, changed = (m.capture(t, place, e) for e in ((), Scale(f"{place}@1", 1.7)))
        there, moved = t.column(1).tolist(), changed[place] != plain[place]
        assert [sorted(set(row.nonzero()[:, 0].tolist())) for row in moved] == [[c] for c in there]


def test_positions_can_be_given_beside_the_address():
    m, d = model("llama"), noise(32)
    both = m.run(IDS, Add("resid_pre.1", d, positions=(1, -2)))
    assert torch.equal(both, m.run(IDS, [Add("resid_pre.1@1", d), Add("resid_pre.1@-2", d)]))
    with pytest.raises(Refused, match="twice"):
        m.run(IDS, Add("resid_pre.1@1", d, positions=(2,)))


@pytest.mark.parametrize("name", KINDS)
def test_project_erases_and_keeps(name):
    m, rows = model(name), noise(2, 32)
    basis = torch.linalg.qr(rows.T).Q
    for site in ("resid_pre.1", "attn_out.1", "resid_post.1"):
        plain, erased, kept = (
            m.capture(IDS, site, e)[site] for e in ((), Project(site, rows), Project(site, rows, keep=True))
        )
        assert gap(erased @ basis + 1, torch.ones(2, 7, 2)) < 1e-5
        assert gap(erased + kept, plain) < 1e-5


@pytest.mark.parametrize("how", ["mean", "resample", "optimal"])
def test_ablate_puts_the_given_baseline(how):
    m, value = model("gpt2"), noise(8)
    assert torch.equal(m.run(IDS, Ablate("z.0.1", how, value)), m.run(IDS, Replace("z.0.1", value)))
    with pytest.raises(Refused, match="missing"):
        Ablate("z.0.1", how)
    with pytest.raises(Refused, match="takes no value"):
        Ablate("z.0.1", "zero", value)


@pytest.mark.parametrize("name", KINDS)
def test_nested_edits_add_up_and_captures_see_them(name):
    m = model(name)
    pairs = [("head_out.1.0", "head_out.1.1"), ("head_out.1.0", "attn_out.1"), ("mlp_in.1", "attn_out.1"),
             ("q.1", "q.1"), ("pattern.1.1", "scores.1.1"), ("final.scale", "final.scale")]  # fmt: skip
    for one, two in pairs:
        together = m.run(IDS, [Scale(one, 0.5), Scale(two, 0.25)])
        for first, then in ((Scale(one, 0.5), Scale(two, 0.25)), (Scale(two, 0.25), Scale(one, 0.5))):
            with m.edited(first), m.edited(then):
                assert gap(m.run(IDS), together) < 1e-6, (first.address, then.address)
    if "resid_mid" in sites(m):
        together = m.run(IDS, [Scale("resid_mid.1", 0.5), Scale("mlp_in.1", 0.25)])
        with m.edited(Scale("mlp_in.1", 0.25)), m.edited(Scale("resid_mid.1", 0.5)):
            assert gap(m.run(IDS), together) < 1e-6
    for place in ("head_out.1", "final.scale", "z.1", "attn_out.1", "q.1", "pattern.1"):
        plain, seen = m.capture(IDS, place)[place], m.capture(IDS, place, Scale(place, 0.5))[place]
        assert gap(seen, plain / 2) < 1e-6, place


@pytest.mark.parametrize("name", ["falcon_7b", "llama", "opt"])
def test_a_value_put_into_a_model_stays_the_users(name):
    """Falcon adds in place to what its MLP returned; a replaced value must not be what it writes into."""
    m, value = model(name), noise(2, 7, 32)
    kept = value.clone()
    edits = [Replace(f"{s}.1", value) for s in ("mlp_out", "attn_out", "resid_post")] + [Add("resid_post.0", value)]
    first = m.run(IDS, edits)
    assert torch.equal(value, kept)
    assert torch.equal(m.run(IDS, edits), first)
    m.run(IDS, Replace("mlp_out.1", value[:1]))


def test_freezing_aligns_prompts_token_by_token_across_padding():
    m = model("llama_gqa")
    left, right = PADDED["left"], PADDED["right"]
    for site in ("resid_pre.1", "z.1.2", "v.0"):
        source = m.capture(left, site)
        assert gap(m.run_last(right, Freeze(site, source)), m.run_last(right)) < 1e-5
        assert torch.equal(m.run_last(left, Freeze(site, source)), m.run_last(left))
    with pytest.raises(Refused, match="same lengths"):
        m.run(right, Freeze("pattern.1", m.capture(left, "pattern.1")))
    with pytest.raises(Refused, match="same lengths"):
        m.run(IDS, Freeze("z.1", m.capture(batch([LONG[:4]]), "z.1")))
    with pytest.raises(Refused, match="same lengths"):
        m.run(batch([LONG] * 3), Freeze("z.1", m.capture(IDS, "z.1")))


def test_logits_can_be_edited_and_read_at_positions_while_only_the_last_is_asked_for():
    m, d = model("llama"), noise(101)
    for t in PADDED.values():
        assert gap(m.run_last(t, Add("logits@-1", d)) - m.run_last(t), d.expand(2, -1)) < 1e-5
        assert gap(m.run_last(t, Add("logits@0", d)), m.run_last(t)) < 1e-6
        assert m.capture(t, "logits", logits=False)["logits"].shape == (2, 7, 101)


def test_the_model_itself_runs_edited_inside_the_context():
    m = model("llama")
    with m.edited(Ablate("z.1.0")):
        assert torch.equal(bare(m.hf), m.run(IDS))
        assert gap(bare(m.hf), m.run(IDS, Ablate("z.1.0"))) == 0.0
    assert torch.equal(bare(m.hf), m.run(IDS))


class Double(Edit):
    """A user's own edit."""

    def __init__(self, address):
        self.address, self.positions = address, None

    def apply(self, x, frame):
        return at_places(self, x, frame, lambda old: 2 * old)


def test_own_edits_are_edits():
    m = model("llama")
    assert torch.equal(m.run(IDS, Double("z.1@2")), m.run(IDS, Scale("z.1@2", 2.0)))


REFUSED = [
    (lambda: Replace("z.1.2", noise(9)), "do not fit"),
    (lambda: Replace("z.1.2@0", noise(3, 8)), "do not fit"),
    (lambda: Add("resid_pre.0", noise(31)), "do not fit"),
    (lambda: Add("resid_pre.0", noise(1, 2, 7, 32)), "do not fit"),
    (lambda: Project("resid_pre.0", noise(2, 31)), "do not fit"),
    (lambda: Scale("resid_pre.0@7", 2.0), "outside the prompt"),
    (lambda: Scale("resid_pre.0@-8", 2.0), "outside the prompt"),
    (lambda: Scale("z.3", 2.0), "outside this model"),
    (lambda: Scale("z.0.4", 2.0), "outside this model"),
    (lambda: Scale("pos_embed", 2.0), "no such place"),
    (lambda: Scale("z.*", 2.0), "pattern"),
    (lambda: Knockout("z.1", queries=(1,), keys=(0,)), "only attention edges"),
    (lambda: Knockout("pattern.1"), "names no edge"),
    (lambda: Knockout("pattern.1", queries=(0,), keys=(0,)), "keep no key"),
    (lambda: Knockout("pattern.1", queries=(9,), keys=(0,)), "outside the prompt"),
    (lambda: Freeze("z.1", {}), "no z.1"),
]


@pytest.mark.parametrize(
    ("edit", "word"), REFUSED, ids=[w.replace(" ", "_") + str(i) for i, (_, w) in enumerate(REFUSED)]
)
def test_wrong_edits_are_refused(edit, word):
    m = model("llama")
    with pytest.raises(Refused, match=word):
        m.run(IDS, [edit()])
    assert torch.equal(m.run(IDS), bare(m.hf))


def test_what_is_no_edit_is_refused():
    with pytest.raises(Refused, match="not an edit"):
        as_edits.__wrapped__(["z.1"])  # the checker of types, which would come first, stands around it


def test_what_can_only_be_read_is_refused():
    with pytest.raises(Refused, match="only be read"):
        model("mixtral").run(IDS, Scale("router.0", 2.0))


def test_an_edit_that_no_forward_reaches_is_refused():
    lazy = copy.deepcopy(model("llama").hf)
    lazy.model.layers[1].mlp.forward = lambda x: x
    m = type(model("llama"))(lazy)
    with pytest.raises(Refused, match="never passed there"), m.edited(Scale("mlp_post.1", 2.0)):
        m.run(IDS)


def test_a_sink_of_the_softmax_is_no_key():
    config = GptOssConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                          num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
                          max_position_embeddings=64, sliding_window=4, rope_parameters={"rope_type": "default",
                          "rope_theta": 1e4})  # fmt: skip
    torch.manual_seed(0)
    m = Model(GptOssForCausalLM(config).eval())
    acts = m.capture(IDS, ["pattern", "scores", "v", "z"], Knockout("pattern.1", queries=(-1,), keys=(2,)))
    pattern, v = acts["pattern.1"], acts["v.1"].repeat_interleave(2, dim=2)
    assert pattern.shape == acts["scores.1"].shape == (2, 4, 7, 7)
    assert torch.equal(pattern[:, :, -1] == 0, torch.arange(7)[None, None].expand(2, 4, 7) == 2)
    assert gap(torch.einsum("bhqk,bkhd->bqhd", pattern, v), acts["z.1"]) < 1e-5


class Watched(Edit):
    """An edit that notes the frames it is given, and leaves a word for the next one of its kind."""

    def __init__(self, address, noted):
        self.address, self.positions, self.noted = address, None, noted

    def apply(self, x, frame):
        before = frame.scratch.setdefault("watched", [])
        self.noted.append((str(self.where), frame.variant, len(x), tuple(before)))
        before.append(str(self.where))
        return x


def test_the_frame_says_which_variant_an_edit_is_of_and_keeps_what_its_edits_tell_each_other():
    m, noted = model("llama"), []
    variants = [[Watched("resid_mid.0", noted), Watched("z.1", noted)], [Scale("z.0", 2.0)], [Watched("z.1", noted)]]
    sweep(m, IDS, variants, lambda logits, prompt: logits[:, 3])
    assert sorted(noted) == [("resid_mid.0", 0, 2, ()), ("z.1", 0, 2, ("resid_mid.0",)), ("z.1", 2, 2, ())]
    noted.clear()
    with m.edited(Watched("z.0", noted), Watched("z.1", noted)):
        m.run(IDS)
        m.run(IDS)
    assert [before for *_, before in noted] == [(), ("z.0",), (), ("z.0",)], "each forward begins with none"
