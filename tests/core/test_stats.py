"""Statistics keep their promises: coverage, known values, uniform p-values, disjoint controls."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutaway.core.refuse import Refused
from cutaway.core.stats import (
    bootstrap,
    exceeds_null,
    false_discovery,
    generator,
    matched_random,
    mean_interval,
    null_band,
    paired,
    permutation,
    rank_correlation,
    ratio_interval,
    rotation,
    share_interval,
    wilson,
    wilson_interval,
)

#: values of prompts with a known mean: [prompt experiment] from uniform and normal numbers of that shape
KINDS = {
    "normal": (lambda u, z: z, 0.0),
    "bounded": (lambda u, z: u, 0.5),
    "heavy tails": (lambda u, z: z / (-u.log()).sqrt(), 0.0),  # Student's t with 2 degrees of freedom
    "skewed": (lambda u, z: (z / 2).exp(), math.exp(1 / 8)),
    "near its upper bound": (lambda u, z: u ** (1 / 6), 6 / 7),
    "exponential": (lambda u, z: -u.log(), 1.0),
}


def covered(bounds, truth):
    return ((bounds[..., 0] <= truth) & (bounds[..., 1] >= truth)).float().mean().item()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8, 12, 16, 60])
def test_intervals_of_means_cover_what_they_say_of_few_prompts_and_many(n):
    g = generator(n)
    u, z = torch.rand(n, 6000, generator=g, dtype=torch.double), torch.randn(n, 6000, generator=g, dtype=torch.double)
    for kind, (make, mean) in KINDS.items():
        share = covered(mean_interval(make(u, z)), mean)
        assert 0.925 < share < 0.985, (kind, share)  # ± 0.01 of chance
    assert 0.89 < covered(mean_interval(z.exp()), math.exp(0.5)) < 0.96  # skewed without measure
    if n >= 8:
        assert 0.47 < covered(mean_interval(z, level=0.5), 0.0) < 0.57
    if n == 4:  # the percentile bootstrap, for comparison
        draws, tails = torch.randint(n, (400, n), generator=g), torch.tensor([0.025, 0.975], dtype=torch.double)
        assert covered(z[draws].mean(1).quantile(tails, dim=0).T, 0.0) < 0.82


@pytest.mark.parametrize("n", [2, 4, 8, 40])
def test_intervals_of_ratios_cover_what_they_say(n):
    g = generator(n)
    above, below = torch.randn(n, 4000, generator=g) + 3, torch.randn(n, 4000, generator=g) + 6
    assert 0.93 < covered(ratio_interval(above, below), 0.5) < 0.985
    assert torch.allclose(ratio_interval(above, torch.ones_like(above)), mean_interval(above))
    assert ratio_interval(above[:1], below[:1]).isnan().all()
    assert ratio_interval(above, torch.zeros_like(below)).isnan().all()


def test_an_interval_of_a_mean_is_students_where_values_lie_evenly_and_never_narrower():
    from scipy import stats

    values = torch.tensor([-3.0, -1.0, 1.0, 3.0])
    reach = stats.t.ppf(0.975, 3) * (1 + 1.4 / 16) * float(values.std()) / 2
    assert mean_interval(values).tolist() == pytest.approx([-reach, reach])
    low, high = mean_interval(torch.tensor([0.0, 0.0, 0.0, 8.0])).tolist()
    assert high - 2 > 2 - low > 0, "wider on the side of the long tail"
    shifted = mean_interval(-torch.tensor([0.0, 0.0, 0.0, 8.0]))
    assert shifted.tolist() == pytest.approx([-high, -low])


def test_an_outlier_among_few_values_lengthens_an_interval_to_twice_students_at_most():
    from scipy import stats

    values = torch.tensor([-16.2, -6.3, -21.3, -15.9, -21.5, -18.9, -19.3, -13.6])  # heads exchanged in eight sentences
    reach = stats.t.ppf(0.975, 7) * (1 + 1.4 / 64) * float(values.std()) / math.sqrt(8)
    low, high = (mean_interval(values) - values.mean()).tolist()
    assert (-low, high) == pytest.approx((reach, 2 * reach))


def test_intervals_keep_shapes_bounds_and_single_cells():
    values = torch.randn(12, 2, 3, generator=generator(0))
    before = torch.random.get_rng_state()
    bounds = mean_interval(values)
    assert torch.equal(before, torch.random.get_rng_state())
    assert bounds.shape == (2, 3, 2)
    assert torch.equal(bounds[1, 2], mean_interval(values[:, 1, 2]))
    assert mean_interval(torch.tensor([0.5, 1.0]), within=(0.0, 1.0)).tolist() == [0, 1]
    assert mean_interval(torch.full((5,), 0.3)).tolist() == pytest.approx([0.3, 0.3])
    assert mean_interval(torch.tensor([1.0, math.nan])).isnan().all()


def test_shares_of_few_prompts_have_wilsons_interval():
    hits = torch.tensor([[1.0, 0.0, 1.0]] * 3 + [[1.0, 0.0, 0.0]])
    assert share_interval(hits).tolist() == [pytest.approx(wilson(k, 4), abs=1e-6) for k in (4, 0, 3)]
    assert share_interval(hits[:1]).isnan().all()
    assert share_interval(torch.full((3, 1), math.nan)).isnan().all()


def test_one_prompt_gives_no_interval():
    assert mean_interval(torch.ones(1, 3)).isnan().all()
    assert all(math.isnan(b) for b in bootstrap([torch.ones(1)], lambda x: x.mean()))


def test_bootstrap_of_a_statistic_agrees_with_the_mean():
    values = torch.randn(40, generator=generator(3)) + 2
    low, high = bootstrap([values], lambda x: x.mean())
    closed = mean_interval(values)
    assert (low, high) == pytest.approx(closed.tolist(), abs=0.05)
    x = torch.randn(50, generator=generator(5))
    import numpy as np

    low, high = bootstrap([x, x + 0.01 * torch.randn(50, generator=generator(6))], lambda a, b: np.corrcoef(a, b)[0, 1])
    assert 0.99 < low <= high <= 1


def test_rank_correlations_are_those_of_scipy_for_many_resamples_at_once():
    from scipy import stats

    x, y = torch.randn(2, 30, generator=generator(1)).round(decimals=1).numpy()  # with ties
    assert float(rank_correlation(x, y)) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert math.isnan(rank_correlation(x, y * 0))
    one = bootstrap([torch.tensor(x), torch.tensor(y)], rank_correlation, samples=50, vectorized=True)
    by_turns = bootstrap([torch.tensor(x), torch.tensor(y)], lambda a, b: rank_correlation(a, b), samples=50)
    assert one == pytest.approx(by_turns, abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (95, 100, 0.8882, 0.9785), (10, 10, 0.7225, 1.0)],
)
def test_wilson_against_published_values(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=2e-4)


def test_wilson_of_nothing_is_nothing():
    assert all(math.isnan(b) for b in wilson(0, 0))


@pytest.mark.parametrize("trials", [1, 3, 114, 4096])
def test_wilson_of_many_shares_is_scipys_of_each(trials):
    hits = sorted({*range(0, trials + 1, max(1, trials // 7)), trials})
    got = wilson_interval(torch.tensor(hits, dtype=torch.double) / trials, trials)
    from scipy import stats

    want = [stats.binomtest(k, trials).proportion_ci(method="wilson") for k in hits]
    assert torch.allclose(got, torch.tensor([[w.low, w.high] for w in want], dtype=torch.double), rtol=1e-12, atol=0)
    assert got[0, 0] == 0.0
    assert got[-1, 1] == 1.0


def test_permutation_finds_a_difference_and_no_other():
    g = generator(0)
    a, b = torch.randn(30, generator=g), torch.randn(30, generator=g)
    assert permutation(a + 2, b, samples=999).p < 0.01
    assert permutation(a, b, samples=999).p > 0.05
    assert permutation(a + 2, b, samples=999).statistic == pytest.approx((a + 2).mean().item() - b.mean().item())


def test_permutation_p_values_are_uniform_under_the_null():
    g = generator(7)
    p = [permutation(torch.randn(8, generator=g), torch.randn(8, generator=g), samples=199).p for _ in range(120)]
    assert 0.0 <= sum(v < 0.05 for v in p) / len(p) < 0.12
    assert 0.35 < sum(p) / len(p) < 0.65


def test_paired_sees_through_variance_between_pairs():
    g = generator(2)
    base = 10 * torch.randn(20, generator=g)
    shifted = base + 0.5 + 0.1 * torch.randn(20, generator=g)
    assert paired(shifted, base, samples=999).p < 0.01
    assert permutation(shifted, base, samples=999).p > 0.2
    with pytest.raises(Refused, match="equal lengths"):
        paired(base, base[:3])


def test_exceeds_null_counts_and_never_gives_zero():
    null = torch.tensor([[1.0, -2.0, 3.0]])
    assert exceeds_null(torch.tensor([2.5]), null).item() == pytest.approx(0.5)
    assert exceeds_null(torch.tensor([-2.5]), null, two_sided=False).item() == 1.0
    assert exceeds_null(torch.tensor([99.0]), null).item() == pytest.approx(0.25)


def test_false_discovery_known_values():
    p = torch.tensor([[0.01, 0.04], [0.03, 0.005]])
    assert torch.allclose(false_discovery(p), torch.tensor([[0.02, 0.04], [0.04, 0.02]]))


@given(st.sets(st.integers(0, 19), min_size=1, max_size=9), st.integers(0, 5))
def test_matched_random_sets_are_disjoint_from_the_choice_and_of_its_size(chosen, seed):
    sets = matched_random(sorted(chosen), 20, seed=seed, samples=4)
    assert len(sets) == 4
    for drawn in sets:
        assert len(set(drawn)) == len(chosen)
        assert not set(drawn) & chosen
    assert sets == matched_random(sorted(chosen), 20, seed=seed, samples=4)


@given(st.sets(st.integers(0, 19), min_size=1, max_size=9), st.integers(0, 5))
def test_sets_matched_by_group_have_as_many_of_each(chosen, seed):
    groups = [i % 3 for i in range(20)]
    many = {g: sum(groups[i] == g for i in chosen) for g in range(3)}
    if any(2 * n > groups.count(g) for g, n in many.items()):
        with pytest.raises(Refused, match="are left"):
            matched_random(sorted(chosen), 20, groups=groups, seed=seed, samples=4)
        return
    for drawn in matched_random(sorted(chosen), 20, groups=groups, seed=seed, samples=4):
        assert len(set(drawn)) == len(drawn) == len(chosen)
        assert not set(drawn) & chosen
        assert {g: sum(groups[i] == g for i in drawn) for g in range(3)} == many


def test_matched_random_refuses_an_impossible_control():
    with pytest.raises(Refused, match="only 4 are left"):
        matched_random(range(6), 10)


def test_null_band_is_the_own_range_or_pooled():
    null = torch.randn(5, 40, generator=generator(0))
    band, share, pooled = null_band(null)
    assert torch.equal(band, torch.stack([null.amin(-1), null.amax(-1)], -1))
    assert (share, pooled) == (pytest.approx(2 / 41), False)
    few = null[:, :4]
    band, share, pooled = null_band(few)
    rest = torch.stack([few[:, [j for j in range(4) if j != i]].mean(-1) for i in range(4)], -1)
    reach = (few - rest).abs().max()
    torch.testing.assert_close(band, torch.stack([few.mean(-1) - reach, few.mean(-1) + reach], -1))
    assert (share, pooled) == (pytest.approx(1.3 / 21), True)
    assert null_band(null, cells=100)[1:] == (pytest.approx(1.3 / 201), True)
    holes = null_band(torch.cat([few, torch.full((1, 4), torch.nan)]))[0]
    torch.testing.assert_close(holes[:-1], band)
    rest = torch.stack([few[[j for j in range(5) if j != i]].mean() for i in range(5)])
    reach = (few - rest[:, None]).abs().max()
    torch.testing.assert_close(holes[-1], torch.stack([few.mean() - reach, few.mean() + reach]))
    one = null_band(torch.tensor([[1.0, 3.0], [torch.nan, torch.nan]]))[0]
    assert one[1].tolist() == [-1.0, 5.0], "a single cell stands for every other"


@pytest.mark.parametrize(
    ("kind", "spread"), [("normal", "none"), ("heavy", "layer"), ("skewed", "cell"), ("normal", "layer")]
)
def test_chance_leaves_about_one_cell_outside_a_pooled_band_whatever_the_scales(kind, spread):
    g, layers, heads, outside, found, left = generator(1), 12, 12, [], [], []
    groups = torch.arange(layers).repeat_interleave(heads)
    for _ in range(60):
        x = torch.randn(layers * heads, 5, generator=g)
        x = x.exp() - 1 if kind == "skewed" else x
        if kind == "heavy":
            x = x / torch.randn(layers * heads, 5, 4, generator=g).square().mean(-1).sqrt()
        scale = (
            torch.randn(layers if spread == "layer" else layers * heads, generator=g)
            .mul(1.5 * (spread != "none"))
            .exp()
        )
        scale = scale[groups] if spread == "layer" else scale
        x = x * scale[:, None]
        band, share, pooled = null_band(x[:, :4], groups=groups)
        assert pooled
        assert share * len(x) < 1.1
        outside.append(float(((x[:, 4] < band[:, 0]) | (x[:, 4] > band[:, 1])).sum()))
        found.append(float((8 * scale > band[:, 1] - x[:, :4].mean(-1)).float().mean()))
        gone = torch.randperm(len(x), generator=g)[64:]
        some = x[:, :4].index_fill(0, gone, torch.nan)
        band, most, _ = null_band(some, groups=groups)
        left.append(float(((x[:, 4] < band[:, 0]) | (x[:, 4] > band[:, 1])).float().mean()))
    assert 0.2 < sum(outside) / 60 < 1.4
    assert 0.001 < sum(left) / 60 < most < 0.02, "of cells without samples too"
    if kind == "normal":
        assert sum(found) / 60 > 0.95, "an effect of eight times its cell's own scale stands out, in late layers too"


def test_rotations_are_orthonormal_and_uniform():
    """The trace of a uniform rotation of 3 dimensions has mean 0 and variance 1; without signs it is about −1."""
    drawn = torch.stack([rotation(3, generator(seed)) for seed in range(900)])
    torch.testing.assert_close(drawn @ drawn.mT, torch.eye(3).expand_as(drawn), atol=1e-5, rtol=0)
    traces = drawn.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(float(traces.mean())) < 4 / 30
    assert float(traces.var()) == pytest.approx(1, abs=0.2)
    frames = rotation(5, generator(0), columns=2, samples=(7,), dtype=torch.double)
    torch.testing.assert_close(frames.mT @ frames, torch.eye(2, dtype=torch.double).expand(7, 2, 2))
