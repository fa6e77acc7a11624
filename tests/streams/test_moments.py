"""Running moments: those of numpy over everything at once, whatever the parts, also where sums would cancel."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from cutaway.core.refuse import Refused
from cutaway.streams import Moments
from tests.meta.tree import ROOT


def rows(n=200, d=6, seed=0, far=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) + far


def same(m: Moments, x: torch.Tensor, tolerance=1e-10):
    y = x.double().numpy()
    np.testing.assert_allclose(m.mean, y.mean(0), rtol=tolerance)
    np.testing.assert_allclose(m.variance, y.var(0), rtol=tolerance)
    np.testing.assert_allclose(m.mean_norm, np.linalg.norm(y, axis=1).mean(), rtol=tolerance)
    np.testing.assert_allclose(m.total_variance, ((y - y.mean(0)) ** 2).sum(1).mean(), rtol=tolerance)
    assert m.count == len(x)
    if m.with_covariance:
        np.testing.assert_allclose(m.covariance, np.cov(y.T, bias=True), rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(m.second, y.T @ y / len(y), rtol=1e-8)


@pytest.mark.parametrize("covariance", [False, True])
@given(cuts=st.lists(st.integers(0, 200), max_size=6))
def test_any_parts_in_one_object_or_merged_give_the_whole(covariance, cuts):
    x, at = rows(), [0, *sorted(cuts), 200]
    parts = [x[a:b] for a, b in pairwise(at)]
    one, merged = Moments(6, covariance), Moments(6, covariance)
    for part in parts:
        one.update(part)
        merged.merge(Moments(6, covariance).update(part))
    same(one, x)
    same(merged, x)


def test_a_mean_far_from_zero_cancels_nothing():
    x = (rows().double() + 1e8).double()
    m = Moments(6)
    for part in x.split(7):
        m.update(part)
    np.testing.assert_allclose(m.variance, (x - 1e8).numpy().var(0), rtol=1e-6)


def test_the_scale_makes_the_mean_norm_the_root_of_the_width():
    x = rows(far=3.0)
    scaled = Moments(6).update(x * Moments(6).update(x).scale)
    assert scaled.mean_norm == pytest.approx(6**0.5)
    assert Moments(6).scale == 1.0


@pytest.mark.parametrize("covariance", [False, True])
def test_files_give_back_every_bit(covariance):
    m = Moments(6, covariance).update(rows())
    back = Moments.from_tensors(m.tensors("a/"), "a/")
    assert back.update(rows(9, seed=1)).tensors().keys() == m.update(rows(9, seed=1)).tensors().keys()
    assert all(torch.equal(t, m.tensors()[n]) for n, t in back.tensors().items())


def test_other_widths_and_what_was_not_counted_are_refused():
    with pytest.raises(Refused, match="width 6"):
        Moments(6).update(torch.zeros(2, 5))
    with pytest.raises(Refused, match="differ"):
        Moments(6).merge(Moments(6, covariance=True))
    with pytest.raises(Refused, match="only variances"):
        Moments(6).update(rows()).covariance  # noqa: B018


OTHER = """
import sys, torch, torch.distributed as dist
from cutaway.models.moments import Moments
dist.init_process_group("gloo", init_method=sys.argv[1], rank=1, world_size=2)
x = torch.randn(50, 6, generator=torch.Generator().manual_seed(7))
found = Moments(6, covariance=True).update(x).gathered()
sys.stdout.write(str(float(sum(t.sum() for t in found.tensors().values())).hex()))
dist.destroy_process_group()
"""


def test_two_processes_end_with_the_same_moments_of_both(tmp_path):
    where = f"file://{tmp_path}/store"
    other = subprocess.Popen([sys.executable, "-c", OTHER, where], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    dist.init_process_group("gloo", init_method=where, rank=0, world_size=2)
    try:
        found = Moments(6, covariance=True).update(rows()).gathered()
    finally:
        dist.destroy_process_group()
    theirs, _ = other.communicate()
    same(found, torch.cat([rows(), torch.randn(50, 6, generator=torch.Generator().manual_seed(7))]))
    assert float.fromhex(theirs) == float(sum(t.sum() for t in found.tensors().values()))
    same(Moments(6).update(rows()).gathered(), rows())
