"""Truths are what their recipes say, the same every time, and can be resumed anywhere."""

from itertools import islice

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.dictionaries.benchmarks import (
    RECIPES,
    WIDTHS,
    SyntheticRecipe,
    absorption,
    hedging,
    superposition,
    synthetic,
    zipf_toy,
)
from cutaway.dictionaries.benchmarks.directions import pushed_apart, random_directions
from cutaway.dictionaries.benchmarks.stream import TruthStream
from cutaway.dictionaries.benchmarks.synthetic import compensated, forest, zipf
from cutaway.dictionaries.benchmarks.truth import Truth

SMALL = SyntheticRecipe(300, 32, roots=3, rank=5)


def test_activations_are_the_sum_of_the_active_directions():
    truth = SMALL.make()
    x, code = truth.draw(64, 7)
    assert torch.allclose(x, code.dense() @ truth.directions + truth.bias, atol=1e-5)
    assert code.n_latents == truth.n_features == 300
    assert x.shape == (64, truth.d)
    assert truth.bias.norm() == pytest.approx(0.5, abs=1e-5)
    assert torch.allclose(truth.directions.norm(dim=-1), torch.ones(300), atol=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    truth = SMALL.make()
    (x, c), (y, _), (z, _) = truth.draw(100, 3), SMALL.make().draw(100, 3), truth.draw(100, 4)
    assert torch.equal(x, y)
    assert not torch.equal(x, z)
    assert c.indptr is not None


def test_a_stream_goes_on_where_its_cursor_was_taken():
    truth = SMALL.make()
    whole = [x for x, _ in islice(truth.batches(16, seed=5), 6)]
    first = truth.batches(16, seed=5)
    list(islice(first, 3))
    again = truth.batches(16, seed=5)
    again.restore(first.state())
    assert all(torch.equal(a, b) for (a, _), b in zip(islice(again, 3), whole[3:], strict=True))
    assert torch.equal(first.batch(1)[0], whole[1])
    other = next(iter(truth.batches(16, seed=6)))[0]
    assert not any(torch.equal(other, x) for x in whole)
    with pytest.raises(Refused, match="seed 6"):
        first.restore(truth.batches(16, seed=6).state())
    with pytest.raises(Refused):
        truth.batches(0)


def test_a_truth_is_a_stream_like_any_other():
    truth = SMALL.make()
    stream = TruthStream(truth, 16, seed=5, site="mlp_out.2")
    assert stream.widths == {"mlp_out.2": 32}
    first = [next(stream) for _ in range(3)]
    assert torch.equal(first[1].acts["mlp_out.2"], truth.batches(16, seed=5).batch(1)[0])
    assert first[2].document.tolist() == list(range(32, 48))
    again = TruthStream(truth, 16, seed=5, site="mlp_out.2").restore(stream.state())
    assert torch.equal(next(again).acts["mlp_out.2"], next(iter(stream)).acts["mlp_out.2"])
    assert stream.identity()["truth"] == truth.about
    with pytest.raises(Refused):
        TruthStream(truth, 32).restore(stream.state())


def test_a_truth_is_saved_whole(tmp_path):
    truth = SMALL.make()
    again = Truth.open(truth.save(tmp_path / "truth.safetensors"))
    assert torch.equal(truth.draw(50, 1)[0], again.draw(50, 1)[0])
    assert again.about["recipe"]["features"] == 300
    assert again.law.exclusive
    zipf_toy(features=8, d=4).save(tmp_path / "plain.safetensors")
    assert Truth.open(tmp_path / "plain.safetensors").law.factor is None
    from cutaway.core.files import write_tensors

    write_tensors(tmp_path / "other.safetensors", {"a": torch.ones(1)}, {"kind": "lens_grid"})
    with pytest.raises(Refused, match="no truth"):
        Truth.open(tmp_path / "other.safetensors")


def test_the_forest_is_numbered_level_by_level():
    assert forest(12, 2, 2, 2).tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert forest(9, 2, 3, 1).tolist() == [-1, -1, 0, 0, 0, 1, 1, 1, -1]
    assert forest(5, 2, 3, 2).tolist() == [-1, -1, 0, 0, 0]
    assert forest(3, 8, 3, 2).tolist() == [-1, -1, -1]


def test_the_published_benchmark_has_its_forest_and_its_sparsity():
    """SynthSAEBench-16k v2: 128 trees of 85 features, frequencies from 0.4 to 5e-4, mean L0 about 34."""
    recipe = RECIPES["16k"]
    parent = forest(recipe.features, recipe.roots, recipe.branching, recipe.depth)
    assert (parent >= 0).sum() == 128 * 84
    base = zipf(recipe.features, recipe.exponent, recipe.most, recipe.least)
    assert (float(base[0]), float(base[-1])) == pytest.approx((0.4, 5e-4))
    few = SyntheticRecipe(recipe.features, 2, roots=recipe.roots, apart=(0, 0.0)).make()
    _, code = few.draw(2048, 0)
    assert float(code.counts().float().mean()) == pytest.approx(34, abs=1.0)


@pytest.mark.parametrize(("name", "l0"), [("1k", 7.25), ("4k", 16.04)])
def test_small_benchmarks_are_frozen(name, l0):
    truth = synthetic(name) if name == "1k" else SyntheticRecipe(4096, 2, roots=32, apart=(0, 0.0)).make()
    _, code = truth.draw(8192, 0)
    assert float(code.counts().float().mean()) == pytest.approx(l0, abs=0.15)
    assert WIDTHS[name][0] * 4 == truth.n_features
    if name == "1k":
        assert float(truth.directions[0, 0]) == pytest.approx(FIRST, abs=1e-5)
        assert float(truth.law.spread[5]) == pytest.approx(SPREAD, abs=1e-6)
    with pytest.raises(Refused, match="1k, 4k, 16k"):
        synthetic("2k")


FIRST, SPREAD = 0.1694106161594391, 0.29287439584732056


def test_probabilities_are_compensated_for_the_forest():
    base = torch.tensor([0.4, 0.1, 0.2, 0.3])
    got = compensated(base, torch.tensor([-1, 0, 0, -1]))
    assert got.tolist() == pytest.approx([0.4, 0.25 * (1 + 0.5), 0.5 * (1 + 0.25), 0.3])
    alone = SyntheticRecipe(2000, 2, roots=1, branching=2, depth=1, apart=(0, 0.0), correlation=0.0).make()
    _, code = alone.draw(30_000, 1)
    base = zipf(2000, 0.5, 0.4, 5e-4)
    got = code.fires() / 30_000
    assert float(got[0]) == pytest.approx(float(base[0]), abs=0.01)
    assert float(got[100:].mean()) == pytest.approx(float(base[100:].mean()), rel=0.03)


def test_pushing_apart_is_gradient_descent_on_the_overlaps():
    w = random_directions(40, 16, generator(0))
    p = w.clone().requires_grad_()
    adam = torch.optim.Adam([p], lr=3e-3)
    for _ in range(20):
        dots = p @ p.T
        off = dots - torch.diag(dots.diag())
        loss = (off**2).sum() + len(w) * ((dots.diag() - 1) ** 2).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    want = torch.nn.functional.normalize(p.detach(), dim=-1)
    got = pushed_apart(w, steps=20, lr=3e-3)
    assert torch.allclose(got, want, atol=2e-4)

    def overlap(v):
        return float(((v @ v.T).fill_diagonal_(0) ** 2).mean())

    assert overlap(got) < 0.9 * overlap(w)


def test_absorption_is_sparser_than_the_truth():
    truth = absorption(seed=3)
    assert torch.allclose(truth.directions @ truth.directions.T, torch.eye(4), atol=1e-5)
    _, code = truth.draw(20_000, 0)
    f = code.dense()
    assert ((f[:, 1] > 0) <= (f[:, 0] > 0)).all()
    assert f.mean(0).tolist() == pytest.approx([0.25, 0.2, 0.05, 0.05], abs=0.015)
    with pytest.raises(Refused):
        absorption(parent=0.1, child=0.2)


def test_hedging_features_are_correlated():
    f = hedging(correlation=0.6).draw(40_000, 0)[1].dense() > 0
    both, alone = float((f[:, 0] & f[:, 1]).double().mean()), float(f.double().mean())
    assert alone == pytest.approx(0.3, abs=0.01)
    assert both > 0.16  # 0.09 if they were independent
    with pytest.raises(Refused):
        hedging(correlation=1.0)


def test_five_features_in_two_dimensions_form_a_pentagon():
    w = superposition(features=5, d=2, steps=700).directions
    angles = torch.atan2(w[:, 1], w[:, 0]).sort().values
    assert torch.allclose(angles.diff(), torch.full((4,), 2 * torch.pi / 5), atol=0.03)
    assert (w.norm(dim=-1) - w.norm(dim=-1).mean()).abs().max() < 0.05


def test_without_sparsity_only_the_important_features_are_represented():
    w = superposition(features=5, d=2, frequency=1.0, importance=0.5, steps=500).directions.norm(dim=-1)
    assert w[:2].min() > 0.9
    assert w[3:].max() < 0.15


def test_the_zipf_toy_has_the_published_size():
    truth = zipf_toy()
    assert (truth.n_features, truth.d) == (1024, 256)
    assert float(truth.draw(4096, 0)[1].counts().float().mean()) == pytest.approx(16, abs=0.7)


def test_more_orthogonal_directions_than_dimensions_are_refused():
    with pytest.raises(Refused, match="dimensions"):
        absorption(d=3)


def test_a_truth_needs_one_direction_a_feature():
    truth = zipf_toy(features=8, d=4)
    with pytest.raises(Refused, match="8 features"):
        Truth(truth.directions[:5], truth.bias, truth.law)
