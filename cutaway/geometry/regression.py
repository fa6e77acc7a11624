"""Regressions of activations on features, judged on examples that were not fitted: what some columns add to others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.stats import generator

_FOLDS = 4
_KNOTS = 6
_NUMBERS = 1 << 22  # most entries of one batch of shuffled residuals


@dataclass(frozen=True)
class Columns:
    """Columns of a regression for each feature.

    Attributes:
        linear: the values, centred.
        curve: per feature, hinges at quantiles of its values, and a step where it is on; [example, 0] if it has two
            values.
        cross: per feature, its products with all others.
    """

    linear: Float[Tensor, "example feature"]
    curve: tuple[Tensor, ...]
    cross: tuple[Tensor, ...]

    @classmethod
    def of(cls, values: Float[Tensor, "example feature"]) -> Columns:
        """Build the columns of all features."""
        linear = _scaled(values.double())
        n = linear.shape[1]
        cross = tuple(_scaled(linear[:, [i]] * linear[:, [j for j in range(n) if j != i]]) for i in range(n))
        return cls(linear, tuple(_scaled(_hinges(v)) for v in values.double().unbind(1)), cross)

    def without(self, feature: int) -> Float[Tensor, "example column"]:
        """Return the linear and curved columns of all other features."""
        others = [i for i in range(self.linear.shape[1]) if i != feature]
        return torch.cat([self.linear[:, others], *(self.curve[i] for i in others)], 1)


def _scaled(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    return x / x.norm(dim=0).clamp_min(1e-12)


def _hinges(v: Float[Tensor, "example"]) -> Float[Tensor, "example column"]:
    levels = v.unique()
    if len(levels) < 3:
        return v.new_zeros(len(v), 0)
    on = v[v != 0]
    at = torch.linspace(0, 1, _KNOTS + 2, dtype=v.dtype)[1:-1]
    knots = (levels[1:-1] if len(levels) <= _KNOTS + 2 else on.quantile(at)).unique()
    step = [(v != 0).double()] if len(on) < len(v) else []
    return torch.stack([*((v - k).clamp_min(0) for k in knots), *step], 1)


def folds(examples: int) -> Int[Tensor, "example"]:
    """Assign each example to one of four folds of equal size, mixed, and the same at each call."""
    return torch.randperm(examples, generator=generator(0)) % _FOLDS


def errors(
    x: Float[Tensor, "example d"],
    base: Float[Tensor, "example base"],
    columns: Float[Tensor, "example column"],
    fold: Int[Tensor, "example"],
    orders: Sequence[Int[Tensor, "example"]] = (),
) -> tuple[Float[Tensor, "example"], Float[Tensor, "example"], Float[Tensor, "sample"]]:
    """Return each example's squared error when it is predicted from a fit to the other folds: from the base columns,
    and from the further columns as well.

    Last comes the null of the mean difference: what the further columns explain of the residuals that the base columns
    leave, shuffled among examples in each of the orders (Freedman & Lane 1983).
    """
    base = torch.cat([x.new_ones(len(x), 1), base], 1)
    left, full, parts = torch.zeros_like(x), torch.zeros_like(x[:, 0]), list[tuple[Tensor, Tensor, Tensor]]()
    for k in range(_FOLDS):
        fit, test = fold != k, fold == k
        solve = _solved(base[fit].T @ base[fit], base[fit].T)  # [base, example]
        rest, p = x - base @ (solve @ x[fit]), columns - base @ (solve @ columns[fit])
        left[test] = rest[test]
        full[test] = _left(rest, p, fit, test).square().sum(1)
        parts.append((p, fit, test))
    null = list[Tensor]()
    size = max(1, _NUMBERS // x.numel())
    for some in (torch.stack(list(orders[i : i + size])) for i in range(0, len(orders), size)):
        y = left[some.T].flatten(1)  # [example, sample * d]
        gain = sum((y[t].square() - _left(y, p, f, t).square()).sum(0) for p, f, t in parts)
        null.append(torch.as_tensor(gain).reshape(len(some), -1).sum(1) / len(x))
    return left.square().sum(1), full, torch.cat(null) if null else x.new_zeros(0)


def _left(y: Tensor, columns: Tensor, fit: Tensor, test: Tensor) -> Float[Tensor, "test d"]:
    """Return what is left of the test examples' values after a prediction from the fitted ones."""
    own = columns[fit]
    return y[test] - columns[test] @ _solved(own.T @ own, own.T @ y[fit])


def _solved(products: Float[Tensor, "*set column column"], right: Tensor) -> Tensor:
    """Return the solution of normal equations of columns of length about 1; columns that depend on others share it."""
    ridge = 1e-9 * torch.eye(products.shape[-1], dtype=products.dtype)
    return torch.cholesky_solve(right, torch.linalg.cholesky(products + ridge))


def directions(
    values: Float[Tensor, "example feature"], x: Float[Tensor, "example d"], weight: Float[Tensor, "sample example"]
) -> Float[Tensor, "sample feature d"]:
    """Return the directions that features are written in: weighted least squares with an intercept."""
    z = torch.cat([values.new_ones(len(values), 1), values], 1)
    found = list[Tensor]()
    for w in weight:
        weighted = z * w[:, None]
        inverse = torch.linalg.pinv(weighted.T @ z, rtol=1e-10, hermitian=True)
        found.append((inverse @ (weighted.T @ x))[1:])
    return torch.stack(found)
