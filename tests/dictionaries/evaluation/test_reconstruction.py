"""Reconstruction, firing and geometry against their definitions, and the traps that lie there."""

from dataclasses import replace

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.core.result import open_result
from cutaway.core.stats import generator
from cutaway.dictionaries import Dictionary, SparseCode, autoencoder, one_block, together
from cutaway.dictionaries.evaluation.controls import (
    controls,
    mlp_neurons,
    neuron_sites,
    neurons,
    pca_dictionary,
    principal,
    random_dictionary,
)
from cutaway.dictionaries.evaluation.evidence import ANY, Evidence, encode_evidence
from cutaway.dictionaries.evaluation.firing import firing_of, firing_scores
from cutaway.dictionaries.evaluation.geometry import cosines, decoder_rows, geometry, geometry_scores, nearest
from cutaway.dictionaries.evaluation.reconstruction import fvu, ratio_score, reconstruction_scores
from cutaway.dictionaries.evaluation.scores import Scores, joined, over_seeds
from cutaway.dictionaries.gates import BatchTopK, JumpRelu, MatchingPursuit, TopK
from cutaway.streams.batch import Batch
from tests.dictionaries.evaluation import made


def seen(signed: bool = False, **changes):
    x = made.activations()
    return x, encode_evidence(made.random_autoencoder(signed=signed), Evidence({made.SITE: x}, **changes))


@pytest.mark.parametrize("signed", [False, True])
def test_reconstruction_is_what_the_definitions_say(signed):
    x, s = seen(signed)
    d = s.dictionary
    f, out = s.code.dense().double(), d.forward(x).double()
    got = reconstruction_scores(s)
    wide = x.double()
    length = wide.norm(dim=-1)
    want = {
        "L0": float((f != 0).sum(1).double().mean()),
        "FVU": float(((wide - out) ** 2).sum() / ((wide - wide.mean(0)) ** 2).sum()),
        "norm ratio": float((out.norm(dim=-1) / length).mean()),
        "relative bias": float((out**2).sum() / (wide * out).sum()),
        "cosine": float(((wide * out).sum(-1) / length / out.norm(dim=-1)).mean()),
    }
    assert got.labels["score"] == list(want)
    assert got.score.tolist() == pytest.approx(list(want.values()), rel=1e-5)
    assert (got.interval[:, 0] <= got.score + 1e-6).all()
    assert (got.score <= got.interval[:, 1] + 1e-6).all()
    assert got["FVU"].value == pytest.approx(fvu(x, out.float()), rel=1e-5)
    with pytest.raises(Refused, match="near: FVU"):
        got["FVUs"]


def test_negative_latents_count_in_l0():
    _, s = seen(signed=True)
    assert (s.code.value < 0).any()
    assert s.l0 == 3.0


def test_fvu_is_about_the_mean_not_about_zero():
    """A reconstruction that is the mean explains nothing, however far from zero the activations lie."""
    x = made.activations() + 100
    mean = x.mean(0).expand_as(x)
    assert fvu(x, mean) == pytest.approx(1.0, abs=1e-4)
    assert float(((x - mean) ** 2).sum() / (x**2).sum()) < 0.001  # what variance about zero would say


def test_fvu_is_a_ratio_of_sums_not_a_mean_of_ratios():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [10.0, 0.0], [-10.0, 0.0]])
    out = torch.tensor([[0.0, 0.0], [0.0, 0.0], [10.0, 0.0], [-10.0, 0.0]])
    assert fvu(x, out) == pytest.approx(2 / 202)  # the mean of ratios would be 1/2


def test_fvu_keeps_its_digits_on_a_large_mean():
    x = made.activations(20_000).double() + 3000
    noise = torch.randn(x.shape, generator=generator(0), dtype=torch.double) * 0.1
    want = float((noise.float().double() ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
    assert fvu(x, x + noise.float().double()) == pytest.approx(want, rel=1e-6)


def test_special_tokens_are_no_evidence():
    x = made.activations(40).reshape(4, 10, 8)
    x[:, 0] = 1000.0  # the first token of each sequence is a sink
    mask = torch.ones(4, 10, dtype=torch.bool)
    mask[:, 0] = False
    order = torch.arange(4)[:, None].expand(4, 10)
    flat = {made.SITE: x.flatten(0, 1)}
    place = torch.arange(10).expand(4, 10).flatten()
    batch = Batch(flat, torch.zeros(40).long(), order.flatten(), order.flatten(), place, mask.flatten())
    e = Evidence.gather([batch], 1000)
    assert len(e) == 36
    assert e.acts[made.SITE].max() < 100
    assert e.sequence is not None
    assert e.sequence.bincount().tolist() == [9, 9, 9, 9]
    plain = reconstruction_scores(encode_evidence(made.random_autoencoder(), e))
    want = fvu(e.of(made.SITE), made.random_autoencoder().forward(e.of(made.SITE)))
    assert plain["FVU"].value == pytest.approx(want, rel=1e-5)


def test_sources_of_every_form_give_the_same_evidence():
    x = made.activations(100)
    for form in (lambda t: t, lambda t: {ANY: t}):
        assert torch.equal(Evidence.gather([form(x[:60]), form(x[60:])], 90).of("any.site"), x[:90])
    truth = made.truth()
    e = made.evidence(truth, 700)
    assert len(e) == 700
    assert e.truth is not None
    assert torch.allclose(truth.activations(e.truth), e.of(made.SITE), atol=1e-5)
    for wrong in (
        lambda: Evidence.gather([], 5),
        lambda: Evidence({"a": x, "b": x[:5]}),
        lambda: Evidence({"a": x[:0]}),
        lambda: Evidence({"resid_post.0": x}).of("resid_post.9"),
    ):
        with pytest.raises(Refused):
            wrong()


def test_sequences_are_parted_and_resampled_whole():
    x, order = made.activations(), torch.arange(300) // 20
    e = Evidence({made.SITE: x}, sequence=order + 7)
    first, rest = e.parted(0.2)
    assert first.sequence is not None
    assert rest.sequence is not None
    assert set(first.sequence.tolist()) == {7, 8, 9}
    assert not set(first.sequence.tolist()) & set(rest.sequence.tolist())
    assert int(e.groups.max()) == 14
    assert int(Evidence({made.SITE: made.activations(1000)}).groups.max()) == 255
    s = encode_evidence(made.random_autoencoder(), e)
    tokens = reconstruction_scores(encode_evidence(made.random_autoencoder(), Evidence({made.SITE: x})))
    assert not torch.equal(reconstruction_scores(s).interval, tokens.interval)
    with pytest.raises(Refused):
        Evidence({made.SITE: x}, sequence=order * 0).parted()


def test_contexts_are_the_units_where_sequences_are_few():
    x, order = made.activations(), torch.arange(300) // 10
    long = Evidence({made.SITE: x}, sequence=order * 0, context=order)
    first, rest = long.parted()
    assert first.context is not None
    assert rest.context is not None
    assert set(first.context.tolist()) == set(range(8))
    assert not set(first.context.tolist()) & set(rest.context.tolist())
    assert long.how == "95 % over 30 contexts"
    many = Evidence({made.SITE: x}, sequence=torch.arange(300) // 15, context=order)
    assert many.how == "95 % over 20 sequences"  # enough of them
    packed = Evidence({made.SITE: x}, sequence=order // 10, context=order // 20)
    assert packed.how == "95 % over 3 sequences"  # contexts are fewer still
    with pytest.raises(Refused, match="fills one context"):
        Evidence({made.SITE: x}, sequence=order * 0, context=order * 0).parted()


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    d = made.random_autoencoder()
    whole = made.activations(40_000, seed=0)
    true = fvu(whole, d.forward(whole))
    hits = 0
    for i in range(40):
        x = whole[i * 1000 : (i + 1) * 1000]
        error, spread = ((x - d.forward(x)) ** 2).sum(-1), ((x - x.mean(0)) ** 2).sum(-1)
        low, high = ratio_score("FVU", error, spread, Evidence({ANY: x}).groups).interval
        hits += low <= true <= high
    assert 34 <= hits <= 40


def test_controls_are_what_they_say():
    x = made.activations(2000)
    d = made.random_autoencoder()
    e = Evidence({made.SITE: x})
    fit, judge = e.parted()
    got = controls(d, fit, 3.0)
    assert set(got) == {"pca", "pca first", "neurons"}
    centred = (x - x.mean(0)).double()
    values = torch.linalg.eigvalsh(centred.T @ centred)
    first = pca_dictionary(x, 3, first=True)
    assert fvu(x, first.forward(x)) == pytest.approx(float(values[:-3].sum() / values.sum()), rel=1e-4)
    on = {n: encode_evidence(c, judge) for n, c in got.items()}
    assert all(s.l0 == 3 for s in on.values())
    on = {n: fvu(judge.of(made.SITE), s.output[made.SITE]) for n, s in on.items()}
    assert on["pca"] < on["pca first"]
    plain = neurons(x, 8).forward(x)
    assert torch.allclose(plain, x, atol=1e-4)
    mean, rows = principal(x)
    assert torch.allclose(rows @ rows.T, torch.eye(8), atol=1e-5)
    assert torch.allclose(mean, x.mean(0), atol=1e-4)


@pytest.mark.parametrize("gate", [TopK(3), JumpRelu(torch.full((24,), 0.5)), MatchingPursuit(steps=3)])
def test_random_dictionaries_match_norms_and_sparsity(gate):
    d = made.random_autoencoder()
    if isinstance(gate, MatchingPursuit):
        d = replace(d, encoder=({},), gates=(gate,))
    else:
        d = replace(d, gates=(gate,))
    e = Evidence({made.SITE: made.activations(2000)})
    l0 = encode_evidence(d, e).l0
    r = random_dictionary(d, e, l0, seed=3)
    assert torch.allclose(decoder_rows(r).norm(dim=-1), decoder_rows(d).norm(dim=-1), atol=1e-5)
    assert cosines(decoder_rows(r), decoder_rows(d)).diagonal().abs().max() < 0.95
    assert encode_evidence(r, e).l0 == pytest.approx(l0, abs=0.51)
    assert fvu(e.of(made.SITE), encode_evidence(r, e).output[made.SITE]) < 1.5
    assert r.fingerprint() != random_dictionary(d, e, l0, seed=4).fingerprint()


def test_a_transcoder_is_compared_with_a_linear_map():
    g = generator(0)
    x = torch.randn(1500, 6, generator=g)
    y = x @ torch.randn(6, 4, generator=g) + 2
    d = one_block({"mlp_in.0": torch.randn(10, 6, generator=g)}, {"mlp_out.0": torch.randn(10, 4, generator=g)},
                  torch.zeros(10), {"mlp_out.0": torch.zeros(4)}, TopK(2))  # fmt: skip
    e = Evidence({"mlp_in.0": x, "mlp_out.0": y})
    got = controls(d, e, 2.0)
    assert set(got) == {"linear"}
    assert fvu(y, encode_evidence(got["linear"], e).output["mlp_out.0"]) < 1e-4
    r = random_dictionary(d, e, 2.0)
    assert encode_evidence(r, e).l0 == pytest.approx(2.0, abs=0.51)
    writes = ("mlp_out.0", "mlp_out.1")
    rows, bias = {w: torch.zeros(3, 4) for w in writes}, {w: torch.zeros(4) for w in writes}
    two = one_block({"mlp_in.0": torch.zeros(3, 6)}, rows, torch.zeros(3), bias, BatchTopK(1))
    both = Evidence({**e.acts, "mlp_out.1": 2 * y})
    got = encode_evidence(controls(two, both, 1.0)["linear"], both).output
    assert max(fvu(both.of(w), got[w]) for w in writes) < 1e-4
    names = reconstruction_scores(encode_evidence(two, both)).labels["score"]
    assert [n for n in names if n.startswith("FVU")] == ["FVU of mlp_out.0", "FVU of mlp_out.1"]


def test_every_site_of_a_crosscoder_has_its_own_controls():
    g = generator(0)
    x = {f"resid_post.{i}": torch.randn(600, 6, generator=g) * torch.linspace(0.5, 2, 6) + i for i in range(3)}
    e = Evidence(x)
    rows = {s: torch.randn(8, 6, generator=g) for s in x}
    cross = one_block(rows, rows, torch.zeros(8), {s: torch.zeros(6) for s in x}, TopK(2))
    got = {n: encode_evidence(c, e) for n, c in controls(cross, e, 2.0).items()}
    assert set(got) == {"pca", "pca first", "neurons"}
    for s, values in x.items():
        assert torch.equal(got["pca"].output[s], pca_dictionary(values, 2, site=s).forward(values))
    assert got["neurons"].l0 == 6  # two at each of three sites
    layers = together([made.random_autoencoder(24), replace_site(made.random_autoencoder(8))])
    apart = Evidence({made.SITE: made.activations(), "resid_post.2": made.activations(seed=6)})
    on = {n: encode_evidence(c, apart).code.counts() for n, c in controls(layers, apart, 8.0).items()}
    assert set(on["pca"].tolist()) == {6 + 2}  # 8 latents over blocks of 24 and 8
    causal = one_block({s: rows[s] for s in [*x][:2]}, {s: rows[s] for s in [*x][1:]}, torch.zeros(8),
                       {s: torch.zeros(6) for s in [*x][1:]}, TopK(2))  # fmt: skip
    assert set(controls(causal, e, 2.0)) == {"pca, linear"}
    assert encode_evidence(controls(causal, e, 2.0)["pca, linear"], e).output.keys() == {"resid_post.1", "resid_post.2"}


def replace_site(d):
    """The same autoencoder of another site."""
    return autoencoder("resid_post.2", d.encoder[0][made.SITE], d.decoder[0][made.SITE], d.b_enc[0],
                       d.b_dec[made.SITE], d.gates[0], subtract_b_dec=True)  # fmt: skip


def test_a_transcoder_is_compared_with_the_neurons_that_it_stands_for():
    from tests.conformance.subjects import miniworld

    model, g = miniworld(), generator(0)
    ids = torch.randint(5, 300, (6, 20), generator=g)
    sites = ["mlp_in.2", "mlp_post.2", "mlp_out.2"]
    acts = model.capture(ids, sites)
    e = Evidence({s: acts[s].flatten(0, 1) for s in sites})
    d = one_block({"mlp_in.2": torch.zeros(10, 128)}, {"mlp_out.2": torch.randn(10, 128, generator=g)},
                  torch.zeros(10), {"mlp_out.2": torch.zeros(128)}, TopK(2))  # fmt: skip
    assert neuron_sites(model, d) == {"mlp_out.2": "mlp_post.2"}
    width = e.of("mlp_post.2").shape[1]
    whole = mlp_neurons(model, d, e, width)
    assert whole is not None
    assert torch.allclose(encode_evidence(whole, e).output["mlp_out.2"], e.of("mlp_out.2"), atol=1e-3)
    few = mlp_neurons(model, d, e, 3.0)
    assert few is not None
    x, rows = e.of("mlp_post.2"), model.weights.mlp_out[2]
    size = ((x - x.mean(0)) * rows.norm(dim=1)).abs()
    kept = torch.zeros_like(x).scatter(1, size.topk(3).indices, 1.0)
    want = torch.where(kept > 0, x, x.mean(0)) @ rows + model.weights.mlp_out_bias[2]
    assert torch.allclose(encode_evidence(few, e).output["mlp_out.2"], want, atol=1e-3)
    scaled = Evidence(e.acts | {"mlp_out.2": 2 * e.of("mlp_out.2")})  # as if a norm followed
    assert mlp_neurons(model, d, scaled, 3.0) is None
    assert mlp_neurons(model, made.random_autoencoder(), e, 3.0) is None


def test_scores_stand_beside_null_and_controls_and_are_saved(tmp_path):
    x, s = seen()
    e = s.evidence
    null = [encode_evidence(random_dictionary(s.dictionary, e, s.l0, seed=i), e) for i in range(3)]
    other = {n: encode_evidence(d, e) for n, d in controls(s.dictionary, e, s.l0).items()}
    a, b = reconstruction_scores(s, null=null, control=other), firing_scores(s, null=null, control=other)
    got = joined([a, b])
    assert got.null.shape == (8, 3)
    assert got.labels["control"] == ["pca", "pca first", "neurons"]
    assert float(got.control[1, 0]) == pytest.approx(fvu(x, other["pca"].output[made.SITE]), rel=1e-4)
    assert got.units["L0"] == "latents a token"
    again = open_result(got.save(tmp_path / "scores.safetensors"))
    assert isinstance(again, Scores)
    assert torch.equal(again.score, got.score)
    seeds = over_seeds([got, got, replace(got, score=got.score + 3)])
    assert torch.allclose(seeds.score, got.score + 1)
    assert float(seeds.interval[0, 1] - seeds.score[0]) == pytest.approx(4.3027 * 3**0.5 / 3**0.5, rel=1e-3)
    with pytest.raises(Refused):
        over_seeds([a, b])
    from cutaway.views.draw.terminal import terminal

    assert terminal(got, "score") is not None
    assert "<div" in got._repr_html_()


def test_firing_is_counted():
    f = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.0, 4.0, 0.0, 0.0], [0.0, 6.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    _, s = seen()
    e = Evidence({made.SITE: made.activations(4)})
    s = replace(s, evidence=e, code=SparseCode.from_dense(f))
    got = firing_of(s, null=[s, s])
    assert got.frequency.tolist() == [0, 0.75, 0.25, 0.25]
    assert got.mean_active.nan_to_num(-9).tolist() == [-9, 4, 0.5, -1]
    assert got.largest.tolist() == [0, 6, 0.5, 1]
    assert got.density[0] == 1
    assert got.density.sum() == 4
    assert got.density_null.shape == (12, 2)
    from cutaway.core.stats import wilson

    assert got.frequency_interval[1].tolist() == pytest.approx(wilson(3, 4), abs=1e-5)
    scores = firing_scores(s)
    assert (scores["dead"].value, scores["dense"].value) == (0.25, 0.75)
    assert firing_scores(s, dense=0.5)["dense"].value == 0.25
    assert scores.record["dead after tokens"] == 4


def test_density_counts_latents_by_decade():
    f = torch.zeros(1000, 3)
    f[:, 0] = 1
    f[:20, 1] = 1
    f[0, 2] = 1
    _, s = seen()
    s = replace(s, evidence=Evidence({made.SITE: made.activations(1000)}), code=SparseCode.from_dense(f))
    got = firing_of(s)
    hits = {name: int(n) for name, n in zip(got.labels["decade"], got.density.tolist(), strict=True) if n}
    assert hits == {"10^0": 1, "10^-2": 1, "10^-3": 1}


def test_geometry_finds_the_nearest_other_row():
    rows = torch.randn(30, 5, generator=generator(2))
    rows[7] = rows[3] * 2
    rows[9] = -rows[4]
    near, who = nearest(rows)
    all_pairs = torch.nn.functional.normalize(rows, dim=-1) @ torch.nn.functional.normalize(rows, dim=-1).T
    all_pairs.fill_diagonal_(-2)
    assert torch.allclose(near, all_pairs.max(1).values)
    assert int(who[7]) == 3
    assert float(near[3]) == pytest.approx(1.0)
    d = made.random_autoencoder()
    got = geometry(d, samples=3)
    assert got.nearest_null.shape == (24, 3)
    scores = geometry_scores(d)
    assert scores["nearest cosine"].value == pytest.approx(float(got.nearest.mean()), abs=1e-6)
    assert scores["doubles"].value == float((got.nearest > 0.9).float().mean())
    doubled = replace(d, decoder=({made.SITE: d.decoder[0][made.SITE][torch.arange(24) // 2]},))
    assert geometry_scores(doubled)["doubles"].value == 1.0


def test_latents_are_near_others_that_write_their_sites():
    g = generator(0)

    def layer(n: int, latents: int) -> Dictionary:
        reads, writes = f"mlp_in.{n}", f"mlp_out.{n}"
        rows = torch.randn(latents, 4, generator=g)
        return one_block({reads: rows}, {writes: rows}, torch.zeros(latents), {writes: torch.zeros(4)}, TopK(1))

    parts = [layer(0, 5), layer(1, 7), layer(2, 1)]
    per_layer = together(parts)
    got, (first, second) = geometry(per_layer, samples=50), map(geometry, parts[:2])
    assert torch.equal(got.nearest, torch.cat([first.nearest, second.nearest, torch.zeros(1)]))
    assert torch.equal(got.neighbour, torch.cat([first.neighbour, 5 + second.neighbour, torch.tensor([12])]))
    alone = geometry(parts[1], samples=50).nearest_null.mean()
    assert float(got.nearest_null[5:12].mean()) == pytest.approx(float(alone), abs=0.03), "of the width of a site"
    both = {w: torch.randn(5, 4, generator=g) for w in ("mlp_out.0", "mlp_out.1")}
    crossing = replace(
        per_layer,
        blocks=(replace(per_layer.blocks[0], writes=tuple(both)), *per_layer.blocks[1:]),
        decoder=(both, *per_layer.decoder[1:]),
    )
    rows = torch.nn.functional.normalize(decoder_rows(crossing)[:12], dim=-1)
    pairs = (rows @ rows.T).fill_diagonal_(-2.0).max(1)
    got = geometry(crossing)
    assert torch.allclose(got.nearest[:12], pairs.values)
    assert torch.equal(got.neighbour[:12], pairs.indices)
