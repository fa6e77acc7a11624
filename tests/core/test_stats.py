"""Statistics keep their promises: coverage, known values, uniform p-values, disjoint controls."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutaway.core.refuse import Refused
from cutaway.core.stats import (
    bootstrap,
    bootstrap_mean,
    bootstrap_ratio,
    exceeds_null,
    false_discovery,
    generator,
    matched_random,
    null_band,
    paired,
    permutation,
    wilson,
)


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    values = torch.randn(60, 800, generator=generator(0))  # 800 experiments of 60 prompts, true mean 0
    bounds = bootstrap_mean(values, seed=1, samples=1000)
    covered = ((bounds[:, 0] <= 0) & (bounds[:, 1] >= 0)).float().mean().item()
    assert 0.92 < covered < 0.97
    narrow = bootstrap_mean(values, seed=1, samples=1000, level=0.5)
    assert 0.44 < ((narrow[:, 0] <= 0) & (narrow[:, 1] >= 0)).float().mean().item() < 0.56


def test_bootstrap_is_seeded_shaped_and_leaves_the_global_source_alone():
    values = torch.randn(12, 2, 3, generator=generator(0))
    before = torch.random.get_rng_state()
    first = bootstrap_mean(values, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.shape == (2, 3, 2)
    assert torch.equal(first, bootstrap_mean(values, seed=4))
    assert not torch.equal(first, bootstrap_mean(values, seed=5))
    assert (first[..., 0] <= values.mean(0)).all()
    assert (first[..., 1] >= values.mean(0)).all()


def test_many_cells_get_what_each_would_get_alone():
    values = torch.randn(9, 5000, generator=generator(0))
    whole = bootstrap_mean(values, samples=200)
    assert torch.allclose(whole[4321], bootstrap_mean(values[:, 4321], samples=200))


@pytest.mark.parametrize("prompts", [2, 4, 6, 7, 30])
@pytest.mark.parametrize(("samples", "level"), [(2000, 0.95), (41, 0.5)])
def test_intervals_are_the_quantiles_of_all_resamples_bit_for_bit(prompts, samples, level):
    values, below = torch.randn(2, prompts, 700, generator=generator(3)).double().unbind(0)
    values[:, :5], below[:, 600:] = 0.0, 0.0
    values[0, 7], values[0, 8], values[:, 9] = math.nan, math.inf, 1.0
    draws = torch.randint(prompts, (samples, prompts), generator=generator(5))
    weights = torch.zeros(samples, prompts, dtype=torch.double)
    weights = weights.scatter_add_(1, draws, torch.ones_like(weights)) / prompts
    tails = torch.tensor([(1 - level) / 2, 1 - (1 - level) / 2], dtype=torch.double)
    for got, all_of_them in (
        (bootstrap_mean(values, seed=5, samples=samples, level=level), weights @ values),
        (bootstrap_ratio(values, below, seed=5, samples=samples, level=level), (weights @ values) / (weights @ below)),
    ):
        expected = all_of_them.quantile(tails, dim=0).T.float()
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    assert bootstrap_mean(torch.zeros(3, 0)).shape == (0, 2)


def test_the_interval_of_a_ratio_is_that_of_scipy_and_covers_the_truth():
    above, below = torch.randn(40, 300, generator=generator(2)) + 3, torch.randn(40, 300, generator=generator(3)) + 6
    bounds = bootstrap_ratio(above, below, samples=1000)
    assert bounds.shape == (300, 2)
    assert 0.9 < ((bounds[:, 0] <= 0.5) & (bounds[:, 1] >= 0.5)).float().mean() < 0.99
    low, high = bootstrap([above[:, 0], below[:, 0]], lambda x, y: x.mean() / y.mean())
    assert bounds[0].tolist() == pytest.approx([low, high], abs=0.02)
    assert bootstrap_ratio(above[:1], below[:1]).isnan().all()
    assert torch.allclose(bootstrap_ratio(above, torch.ones_like(above)), bootstrap_mean(above, samples=2000))


def test_one_prompt_gives_no_interval():
    assert bootstrap_mean(torch.ones(1, 3)).isnan().all()
    assert all(math.isnan(b) for b in bootstrap([torch.ones(1)], lambda x: x.mean()))


def test_bootstrap_of_a_statistic_agrees_with_the_mean():
    values = torch.randn(40, generator=generator(3)) + 2
    low, high = bootstrap([values], lambda x: x.mean())
    fast = bootstrap_mean(values)
    assert low == pytest.approx(fast[0].item(), abs=0.05)
    assert high == pytest.approx(fast[1].item(), abs=0.05)
    x = torch.randn(50, generator=generator(5))
    import numpy as np

    low, high = bootstrap([x, x + 0.01 * torch.randn(50, generator=generator(6))], lambda a, b: np.corrcoef(a, b)[0, 1])
    assert 0.99 < low <= high <= 1


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (95, 100, 0.8882, 0.9785), (10, 10, 0.7225, 1.0)],
)
def test_wilson_against_published_values(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=2e-4)


def test_wilson_of_nothing_is_nothing():
    assert all(math.isnan(b) for b in wilson(0, 0))


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
    assert (share, pooled) == (pytest.approx(1 / 21), True)
    assert null_band(null, cells=100)[1:] == (pytest.approx(2 / 201), True)
    holes = null_band(torch.cat([few, torch.full((1, 4), torch.nan)]))[0]
    assert holes[-1].isnan().all()
    torch.testing.assert_close(holes[:-1], band)
