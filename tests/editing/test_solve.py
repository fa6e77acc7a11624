"""The solver against independent computations: each constraint's problem, solved as it is stated."""

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.editing.solve import Equality, NullSpace, Ridge, null_space, regularised, solve
from tests.models.common import noise

D, OUT, N = 12, 7, 3
K, R = noise(D, N).double(), noise(OUT, N, seed=1).double()
X = noise(200, D, seed=2).double() * torch.linspace(0.01, 3, D)
C = X.T @ X / len(X)


def delta(constraint, keys=K, wanted=R):
    u, v = solve(keys, wanted, constraint)
    return u @ v


def near(a, b):
    return torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def test_an_equality_solves_the_lagrange_conditions():
    """min tr ΔᵀCΔ with KᵀΔ = Rᵀ: one linear system of Δ and the multipliers, solved whole."""
    system = torch.cat([torch.cat([2 * C, K], 1), torch.cat([K.T, torch.zeros(N, N).double()], 1)])
    want = torch.linalg.solve(system, torch.cat([torch.zeros(D, OUT).double(), R.T]))[:D]
    assert near(delta(Equality(C)), want)
    assert near(K.T @ delta(Equality(C)), R.T)


@pytest.mark.parametrize("weight", [1e-3, 1.0, 50.0])
def test_a_ridge_is_the_least_squares_of_the_stacked_problem(weight):
    root = torch.linalg.cholesky(weight * C).T  # ‖root Δ‖² = λ tr ΔᵀCΔ
    want = torch.linalg.lstsq(torch.cat([K.T, root]), torch.cat([R.T, torch.zeros(D, OUT).double()])).solution
    assert near(delta(Ridge(C, weight)), want)


def test_a_ridge_of_weight_zero_is_the_equality_for_one_key_and_several():
    for n in (1, N):
        exact = delta(Equality(C), K[:, :n], R[:, :n])
        assert near(delta(Ridge(C, 0.0), K[:, :n], R[:, :n]), exact)
        assert torch.allclose(delta(Ridge(C, 1e-9), K[:, :n], R[:, :n]), exact, atol=1e-5)


def test_a_null_space_edit_solves_the_published_system_and_leaves_other_keys_alone():
    other = torch.linalg.qr(noise(D, 4, seed=4).double()).Q  # all ordinary keys lie in four directions
    p, size = null_space(other @ other.T, 0.02)
    assert size == D - 4
    assert float((p @ other).norm()) < 1e-6
    earlier = noise(D, 2, seed=5).double()
    found = delta(NullSpace(p, 0.5, earlier))
    system = p @ (K @ K.T + earlier @ earlier.T) + 0.5 * torch.eye(D).double()
    assert near(found, torch.linalg.solve(system, p @ K @ R.T))
    assert float((other.T @ found).norm()) < 1e-6  # P K₀ = 0: their outputs stay
    assert float((earlier.T @ found).norm()) < float((earlier.T @ delta(NullSpace(p, 0.5, earlier[:, :0]))).norm())


def test_the_ridge_of_the_second_moment_is_in_units_of_its_mean_diagonal():
    made, before, after = regularised(C, 0.01)
    assert near(made - C, 0.01 * C.diagonal().mean() * torch.eye(D).double())
    assert before == pytest.approx(float(torch.linalg.cond(C)))
    assert after == pytest.approx(float(torch.linalg.cond(made)))
    assert after < before


def test_what_no_change_can_meet_is_refused():
    with pytest.raises(Refused, match="dependent"):
        solve(torch.cat([K, K[:, :1]], 1), torch.cat([R, R[:, 1:2]], 1), Equality(C))
    with pytest.raises(Refused, match="of 12"):
        null_space(torch.eye(D), 0.02)
