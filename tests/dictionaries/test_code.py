"""Sparse codes against their dense form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutaway.core.refuse import Refused
from cutaway.dictionaries.code import SparseCode, concat_latents, concat_tokens


def dense(seed: int, n: int = 6, latents: int = 9, share: float = 0.4) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, latents, generator=g).double() * (torch.rand(n, latents, generator=g) < share)


def fixed(f: torch.Tensor, k: int) -> SparseCode:
    index = f.abs().topk(k, dim=1).indices
    return SparseCode(index, f.gather(1, index), f.shape[1])


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.6]))
def test_both_forms_say_what_the_dense_form_says(seed, share):
    f = dense(seed, share=share)
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed)).double()
    for code in (SparseCode.from_dense(f), fixed(f, 9), SparseCode.from_dense(f).csr(), fixed(f, 9).csr()):
        assert len(code) == 6
        assert torch.equal(code.dense(), f)
        assert torch.equal(code.counts(), (f != 0).sum(1))
        assert torch.equal(code.fires(), (f != 0).sum(0))
        assert torch.allclose(code.times(rows), f @ rows, atol=1e-12)
        assert torch.equal(code.select([7, 2, 3]).dense(), f[:, [7, 2, 3]])
        assert torch.equal(code.columns([4]), f[:, [4]])
        assert torch.equal(code.rows([5, 0, 0]).dense(), f[[5, 0, 0]])
        assert torch.equal(code.rows(slice(1, 3)).dense(), f[1:3])
        assert torch.equal(code.scaled(torch.arange(9.0).double()).dense(), f * torch.arange(9.0))
        put = f.clone()
        put[:, [1, 6]] = torch.stack([torch.zeros(6), torch.arange(6.0)], 1).double()
        assert torch.equal(code.put([1, 6], put[:, [1, 6]]).dense(), put)


def test_codes_join_side_by_side_and_below_each_other():
    f, g = dense(1), dense(2, latents=4)
    for one, two in ((SparseCode.from_dense(f), SparseCode.from_dense(g)), (fixed(f, 9), fixed(g, 4)),
                     (SparseCode.from_dense(f), fixed(g, 4))):  # fmt: skip
        assert torch.equal(concat_latents([one, two]).dense(), torch.cat([f, g], 1))
    h = dense(3)
    for one, two in ((SparseCode.from_dense(f), SparseCode.from_dense(h)), (fixed(f, 9), fixed(h, 9)),
                     (SparseCode.from_dense(f), fixed(h, 9))):  # fmt: skip
        assert torch.equal(concat_tokens([one, two]).dense(), torch.cat([f, h]))


def test_wide_codes_are_gathered_and_give_the_same_sums_and_gradients():
    f = torch.zeros(5, 400, dtype=torch.float64)
    f[torch.arange(5), torch.arange(5) * 70] = torch.arange(1.0, 6.0, dtype=torch.float64)
    rows = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)).double()
    for make in (SparseCode.from_dense, lambda f: fixed(f, 2)):
        x, w = f.clone().requires_grad_(), rows.clone().requires_grad_()
        make(x).times(w).square().sum().backward()
        y, v = f.clone().requires_grad_(), rows.clone().requires_grad_()
        (y @ v).square().sum().backward()
        active = f != 0
        assert torch.allclose(x.grad[active], y.grad[active])
        assert torch.allclose(w.grad, v.grad)


def test_a_code_as_dense_as_its_tensor_is_never_taken_apart_unless_asked():
    f, g = dense(4, n=40, share=0.5), dense(5, n=3, share=0.5)
    x, rows = f.clone().requires_grad_(), torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    code = concat_tokens([SparseCode.from_dense(x), SparseCode.from_dense(g)]).scaled(torch.full((9,), 2.0).double())
    code.rows(slice(0, 40)).times(rows).sum().backward()
    assert torch.equal(x.grad, 2 * rows.sum(1).expand(40, 9))
    assert torch.equal(code.counts(), torch.cat([(f != 0).sum(1), (g != 0).sum(1)]))
    assert code.to(dtype=torch.float32).dense().dtype == torch.float32
    assert len(code) == 43
    assert "index" not in vars(code)
    entries = SparseCode(code.index, code.value, 9, code.indptr)
    assert torch.equal(entries.dense(), code.dense())
    assert torch.equal(entries.index, code.csr().index)
    sparse = SparseCode.from_dense(dense(6, share=0.1))
    assert "index" in vars(sparse)
    mixed = concat_tokens([SparseCode.from_dense(g), sparse])
    assert torch.equal(mixed.dense(), torch.cat([g, dense(6, share=0.1)]))
    with pytest.raises(AttributeError, match="entries"):
        getattr(code, "entries")  # noqa: B009


def test_codes_refuse_what_does_not_fit():
    code = SparseCode.from_dense(dense(0))
    with pytest.raises(Refused, match="no such latent"):
        code.select([9])
    with pytest.raises(Refused, match="twice"):
        code.put([1, 1], torch.zeros(6, 2).double())
    with pytest.raises(Refused, match="belong together"):
        SparseCode(code.index, code.value, 9)
    with pytest.raises(Refused, match="tokens"):
        concat_latents([code, SparseCode.from_dense(dense(0, n=2))])
    with pytest.raises(Refused, match="latents"):
        concat_tokens([code, SparseCode.from_dense(dense(0, latents=2))])
    with pytest.raises(Refused, match="rows"):
        code.times(torch.zeros(3, 2).double())
    with pytest.raises(Refused, match="none"):
        concat_latents([])
