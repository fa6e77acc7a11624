"""The sparse sampler has the distribution of the dense definition."""

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.dictionaries.benchmarks.generative import Law

N = 30_000


def law(**changes) -> Law:
    """Two trees (a frequent and a rare root) and free features, rare ones among them, strongly correlated."""
    parent = torch.tensor([-1, -1, 0, 0, 0, 1, 1, 2, 2, -1, -1, -1, -1])
    p = torch.tensor([0.4, 0.015, 0.5, 0.4, 0.3, 0.9, 0.8, 0.6, 0.7, 0.018, 0.01, 0.005, 0.2])
    g = generator(5)
    n = len(p)
    given = {
        "probability": p, "parent": parent, "mean": torch.linspace(3, 2, n), "spread": torch.linspace(0.2, 1.5, n),
        "factor": torch.randn(n, 4, generator=g) * 0.4, "exclusive": True, "scaled": True,
    }  # fmt: skip
    given["factor"] /= (given["factor"].norm(dim=-1, keepdim=True) / 0.8).clamp(min=1)
    return Law(**{**given, **changes})


def dense_draw(law: Law, tokens: int, seed: int):
    """The definition, feature by feature, with everything drawn."""
    g = generator(seed)
    n = len(law)
    z = torch.randn(tokens, n, generator=g)
    if law.factor is not None:
        z = (
            torch.randn(tokens, law.factor.shape[1], generator=g) @ law.factor.T
            + z * (1 - (law.factor**2).sum(-1)).sqrt()
        )
    bar = torch.distributions.Normal(0.0, 1.0).icdf(1 - law.probability)
    size = (law.mean + law.spread * torch.randn(tokens, n, generator=g)).clamp(min=0)
    if law.uniform:
        size = torch.rand(tokens, n, generator=g) * 2 * law.mean
    f = torch.where(z > bar, size, 0)
    for i in range(n):
        if (a := int(law.parent[i])) >= 0:
            f[:, i] *= f[:, a] / law.mean[a] if law.scaled else f[:, a] > 0
        if i + 1 == n or law.parent[i + 1] != law.parent[i]:  # the family is complete: one of it may stay
            family = [j for j in range(n) if law.parent[j] == law.parent[i] >= 0]
            if law.exclusive and len(family) > 1:
                lot = torch.rand(tokens, len(family), generator=g) * (f[:, family] > 0)
                f[:, family] *= lot == lot.max(1, keepdim=True).values
    return f


def drawn(law: Law, tokens: int, seed: int):
    active = law.draw(tokens, generator(seed))
    f = torch.zeros(tokens, len(law))
    assert len({(r, i) for r, i in zip(active.row.tolist(), active.feature.tolist(), strict=True)}) == len(active.row)
    f[active.row, active.feature] = active.value
    return f


def moments(f):
    """Columns whose means are compared: firing, firing together, magnitudes, their squares."""
    on = (f > 0).double()
    pairs = [on[:, i] * on[:, j] for i in range(f.shape[1]) for j in range(i)]
    return torch.cat([on, torch.stack(pairs, 1), f.double(), f.double() ** 2], 1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"factor": None}, {"exclusive": False, "scaled": False}, {"uniform": True}],
    ids=["full", "independent", "plain", "uniform"],
)
def test_the_sampler_has_the_distribution_of_the_definition(changes):
    made = law(**changes)
    a, b = moments(drawn(made, N, 1)), moments(dense_draw(made, N, 2))
    gap = (a.mean(0) - b.mean(0)).abs()
    deviation = ((a.var(0) + b.var(0)) / N).sqrt()
    settled = (a.sum(0) + b.sum(0)) > 50  # what happens that rarely is not normal
    assert settled.sum() > 40
    assert (gap <= 4.5 * deviation + 1e-9)[settled].all(), (gap / deviation)[settled].max()
    assert ((a.sum(0) - b.sum(0)).abs() < 60)[~settled].all()


def test_frequencies_without_a_forest_are_the_probabilities():
    p = torch.tensor([0.3, 0.019, 0.004, 0.001, 0.1])
    g = generator(0)
    factor = torch.randn(5, 3, generator=g) * 0.3
    f = drawn(Law(p, torch.full((5,), -1), torch.ones(5), torch.zeros(5), factor), 200_000, 3) > 0
    assert ((f.double().mean(0) - p).abs() < 4.5 * (p * (1 - p) / 200_000).sqrt()).all()


def test_children_need_their_parents_and_exclude_each_other():
    made = law()
    f = drawn(made, 20_000, 4) > 0
    for i in range(len(made)):
        if (a := int(made.parent[i])) >= 0:
            assert not (f[:, i] & ~f[:, a]).any()
            kin = made.parent == a
            assert f[:, kin].sum(1).max() <= 1
    assert made.children[0].tolist() == [2, 3, 4]
    assert made.children[1].tolist() == [5, 6, -1]
    assert made.depth.tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, 0, 0, 0, 0]


def test_certain_and_impossible_features():
    p = torch.tensor([1.0, 0.0, 0.5])
    f = drawn(Law(p, torch.full((3,), -1), torch.ones(3), torch.zeros(3)), 1000, 0)
    assert (f[:, 0] == 1).all()
    assert (f[:, 1] == 0).all()


def test_refusals():
    three = torch.ones(3)
    for p, parent, factor in [
        (three * 2, [-1, -1, -1], None),
        (three * 0.1, [1, -1, -1], None),
        (three * 0.1, [-1, -1, -1], torch.ones(3, 1)),
    ]:
        with pytest.raises(Refused):
            Law(p, torch.tensor(parent), three, three, factor)
