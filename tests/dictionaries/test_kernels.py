"""Sparse kernels against loops and dense float64 products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutaway.dictionaries.kernels import sparse as kernels
from cutaway.dictionaries.kernels.sparse import Pairs


def ragged(seed: int, tokens: int = 9, latents: int = 13, density: float = 0.3):
    """Pairs with empty tokens and latents, a value each, and the dense form in float64."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(tokens, latents, generator=g)
    dense *= torch.rand(tokens, latents, generator=g) < density
    dense[min(2, tokens - 1)] = 0
    dense[:, latents - 1] = 0
    token, latent = dense.nonzero(as_tuple=True)
    counts = torch.bincount(token, minlength=tokens)
    pairs = Pairs(latent, torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]), latents)
    return pairs, dense[token, latent], dense.double(), g


@given(st.integers(0, 1000), st.sampled_from([1, 9, 40]), st.sampled_from([0.0, 0.1, 1.0]))
def test_products_are_those_of_the_dense_code(seed, tokens, density):
    pairs, value, dense, g = ragged(seed, tokens, density=density)
    w, x = torch.randn(13, 5, generator=g), torch.randn(tokens, 5, generator=g)
    near = {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(kernels.mix(pairs, value, w).double(), dense @ w.double(), **near)
    assert torch.allclose(kernels.spread(pairs, value, x).double(), dense.T @ x.double(), **near)
    assert torch.allclose(kernels.total(pairs, value).double(), dense.sum(0), **near)
    every = (x.double() @ w.double().T)[pairs.token, pairs.index]
    assert torch.allclose(kernels.dots(x, w, pairs).double(), every, **near)


def test_fixed_width_pairs_name_the_same_entries():
    index = torch.tensor([[3, 0], [1, 3], [2, 2]])
    pairs = Pairs.fixed(index, 5)
    assert pairs.token.tolist() == [0, 0, 1, 1, 2, 2]
    assert pairs.index.tolist() == index.reshape(-1).tolist()
    token, latent, starts = pairs.by_latent
    assert latent.tolist() == [0, 1, 2, 2, 3, 3]
    assert token.tolist() == [0, 1, 2, 2, 0, 1]
    assert starts.tolist() == [0, 1, 2, 4, 6, 6]


def test_split_puts_each_pair_into_the_group_of_its_latent():
    pairs, value, dense, g = ragged(3)
    w = torch.randn(13, 4, generator=g)
    parts, order = pairs.split((2, 7, 13))
    got = kernels.mix(parts, value[order], w).view(9, 3, 4).double()
    for group, (start, end) in enumerate([(0, 2), (2, 7), (7, 13)]):
        assert torch.allclose(got[:, group], dense[:, start:end] @ w[start:end].double(), atol=1e-5)


def test_gathered_dots_have_a_kernel_here_and_a_fallback_that_agrees():
    pairs, _, _, g = ragged(1, 30, density=0.8)
    x, w = torch.randn(30, 6, generator=g), torch.randn(13, 6, generator=g)
    assert kernels.has_row_dots("cpu", torch.float32)
    slow = kernels._row_dots_gathered(x, w, pairs.token, pairs.index)
    assert torch.allclose(kernels.row_dots(x, w, pairs.token, pairs.index), slow, atol=1e-6)


def test_without_the_kernel_the_fallback_serves(monkeypatch):
    def missing(*_):
        raise AttributeError("no such operation")

    pairs, _, _, g = ragged(2)
    x, w = torch.randn(9, 6, generator=g), torch.randn(13, 6, generator=g)
    there = kernels.dots(x, w, pairs)
    monkeypatch.setattr(kernels, "_row_dots_kernel", missing)
    kernels.has_row_dots.cache_clear()
    try:
        assert not kernels.has_row_dots("cpu", torch.float32)
        assert torch.allclose(kernels.dots(x, w, pairs), there, atol=1e-6)
    finally:
        kernels.has_row_dots.cache_clear()


def test_a_kernel_that_answers_wrongly_is_not_used(monkeypatch):
    monkeypatch.setattr(kernels, "_row_dots_kernel", lambda x, w, rows, others: torch.zeros(len(rows)))
    kernels.has_row_dots.cache_clear()
    try:
        assert not kernels.has_row_dots("cpu", torch.float32)
    finally:
        kernels.has_row_dots.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(dtype):
    pairs, value, dense, g = ragged(4)
    w = torch.randn(13, 4, generator=g, dtype=dtype)
    got = kernels.mix(pairs, value.to(dtype), w)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), dense @ w.double(), atol=1e-5)
    assert kernels.dots(got, w, pairs).dtype == dtype
