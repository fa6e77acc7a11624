"""The battery of feature properties: toys get their exact verdicts, and its numbers are those of plain computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.geometry import TOYS, Encoding, encode, open_encoding, properties, toy
from cutaway.geometry.properties import sparsity
from cutaway.geometry.regression import directions
from cutaway.tasks.prompts import Prompts
from tests.conformance.subjects import random_llama

WORD = {None: "–", True: "yes", False: "no"}


def truth(name: str) -> list[str]:
    """The verdicts that a toy must get, in words."""
    t = TOYS[name]
    return [WORD[v] for v in (t.decomposable, t.linear, t.superposed, t.basis_aligned, t.partly_aligned)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.wide) for i in range(1, 20))])
@pytest.mark.parametrize("name", list(TOYS))
def test_every_toy_gets_its_exact_verdict(name, seed):
    samples = 40 if seed == 0 else 200
    found = properties(toy(name, seed), samples=samples, seed=seed)
    assert list(found.words().values()) == truth(name), found.reasons
    for verdict, property_ in zip(found.verdict.tolist(), found.labels["property"], strict=True):
        assert not math.isnan(verdict) or found.reasons[property_]


def trained(dense: list[bool], steps: int = 300) -> torch.Tensor:
    """Weights [model, feature, 2] of toy models of superposition (x' = ReLU(WᵀWx + b)), trained side by side."""
    g = torch.Generator().manual_seed(3)
    w = (0.5 * torch.randn(len(dense), 5, 2, generator=g)).requires_grad_()
    b = torch.zeros(len(dense), 1, 5, requires_grad=True)
    chance = torch.tensor([1.0 if d else 0.1 for d in dense])[:, None, None]
    importance = torch.stack([0.3 ** torch.arange(5) if d else torch.ones(5) for d in dense])[:, None]
    optimizer = torch.optim.Adam([w, b], lr=5e-2)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        x = torch.rand(len(dense), 128, 5, generator=g) * (torch.rand(len(dense), 128, 5, generator=g) < chance)
        loss = (importance * ((x @ w @ w.mT + b).relu() - x).square()).mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return w.detach()


def test_trained_toy_models_of_superposition_get_the_verdicts_of_their_regimes():
    g = torch.Generator().manual_seed(0)
    for rows, name in zip(trained([False, True]), ("pentagon", "two_kept"), strict=True):
        values = toy(name, 1).values
        x = values @ rows + 0.01 * torch.randn(len(values), 2, generator=g)
        found = properties(Encoding(values, x, tuple("abcde")), samples=40)
        assert list(found.words().values())[:4] == truth(name)[:4], (name, rows)
        assert found.represented.sum() == (5 if name == "pentagon" else 2)
        assert float(found.dimensionality.nansum()) == pytest.approx(2.0, abs=0.02)  # all dimensions are used


def test_shares_are_those_of_an_analysis_of_variance():
    """On a full factorial design the shares have a closed form."""
    signs = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)]).repeat(200, 1)
    a, c = signs.unbind(1)
    x = torch.stack([2.0 * a + 0.5 * a * c, 3.0 * c], 1)
    found = properties(Encoding(signs, x, ("a", "c")), samples=4)
    assert found.interaction.tolist() == pytest.approx([0.25 / 4.25, 0.25 / 9.25], abs=1e-3)
    assert found.record["worst"]["decomposable"] == "a"
    assert found.words()["decomposable"] == "no"
    five = torch.arange(-2.0, 3.0).repeat(100)[:, None]  # a value and its square, which do not correlate
    found = properties(Encoding(five, 1.5 * five + 0.4 * five.square(), ("v",)), samples=4)
    parts = [float((k * five**p).var()) for k, p in ((1.5, 1), (0.4, 2))]
    assert float(found.curvature) == pytest.approx(parts[1] / sum(parts), abs=3e-3)


def test_directions_and_their_dimensionality_are_those_of_plain_computations():
    one = toy("pentagon", 5)
    z = np.c_[np.ones(len(one.values)), one.values.double().numpy()]
    rows = np.linalg.lstsq(z, one.activations.double().numpy(), rcond=None)[0][1:]
    got = directions(one.values.double(), one.activations.double(), torch.ones(1, len(z), dtype=torch.double))[0]
    assert np.allclose(got.numpy(), rows, atol=1e-10)
    found = properties(one, samples=4)
    for i, own in enumerate(rows):
        unit = own / np.linalg.norm(own)
        interference = sum(float(unit @ other) ** 2 for other in rows)
        assert float(found.dimensionality[i]) == pytest.approx(float(own @ own) / interference, rel=1e-5)
        assert float(found.largest[i]) == pytest.approx(max(unit**2), rel=1e-5)
    one_hot, even = torch.eye(4)[0], torch.ones(4)
    assert sparsity(torch.stack([one_hot, even])).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_what_activations_hold_of_a_model_is_captured_saved_and_judged(tmp_path):
    model, texts = random_llama(), [f"{a} and {b}" for a in ("Mary", "John", "Tom") for b in ("Anna", "the store")]
    values = {"length": [len(t) for t in texts], "store": ["store" in t for t in texts]}
    one = encode(model, Prompts(tuple(texts)), values, "resid_post.1")
    for text, row in zip(texts, one.activations, strict=True):
        alone = model.capture([text], ["resid_post.1"])["resid_post.1"][0, -1]
        assert torch.allclose(alone, row, atol=1e-5)
    assert one.values[:, 1].tolist() == [float("store" in t) for t in texts]
    back = open_encoding(one.save(tmp_path / "a.safetensors"))
    assert back.identity()["hash"] == one.identity()["hash"]
    assert back.features == ("length", "store")
    for wrong in (lambda: encode(model, Prompts(tuple(texts)), {"a": [1.0]}, "resid_post.1"),
                  lambda: encode(model, Prompts(tuple(texts)), values, "resid_post"),
                  lambda: encode(model, Prompts(tuple(texts)), values, "pattern.1"),
                  lambda: properties(one)):  # fmt: skip
        with pytest.raises(Refused):
            wrong()


def test_what_cannot_be_judged_is_refused_and_what_is_not_clear_is_undecided():
    one = toy("identity")
    still = Encoding(torch.ones_like(one.values), one.activations, one.features)
    with pytest.raises(Refused, match="the same in all examples"):
        properties(still)
    with pytest.raises(Refused, match="between 0 and 1"):
        properties(one, margin=0.0)
    with pytest.raises(Refused, match="near: pentagon"):
        toy("pentagn")
    with pytest.raises(Refused, match="infinite"):
        Encoding(one.values, one.activations / 0, one.features)
    g = torch.Generator().manual_seed(1)
    few = torch.randint(0, 2, (48, 2), generator=g).float()
    x = few @ torch.eye(2) + 0.8 * few.prod(1, keepdim=True) + 0.3 * torch.randn(48, 2, generator=g)
    found = properties(Encoding(few, x, ("a", "b")), samples=8)
    assert found.words()["decomposable"] == "–"
    assert "more examples" in found.reasons["decomposable"]
    assert ca.geometry.properties is properties
