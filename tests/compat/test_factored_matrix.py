"""Factored matrices against TransformerLens 3.9's values; products of the wrong shape are refused."""

import pytest
import torch

from bench.compat import helpers
from cutaway.compat.transformer_lens import FactoredMatrix
from cutaway.compat.transformer_lens.utils import Mismatch, composition_scores
from tests.compat.helpers import REFERENCE, model, same


def test_every_product_and_part_equals_transformer_lens():
    same(helpers.matrices(FactoredMatrix, composition_scores), REFERENCE["matrices"])


def test_the_decomposition_gives_the_matrix_back():
    m = model("gpt2").OV
    u, s, v = m.svd()
    torch.testing.assert_close(u * s[..., None, :] @ v.mT, m.AB, atol=1e-5, rtol=1e-4)
    with pytest.warns(DeprecationWarning, match="Vh is V"):
        assert torch.equal(m.Vh, v)
    even = m.make_even()
    torch.testing.assert_close(even.A.norm(dim=-2), even.B.norm(dim=-1), atol=1e-5, rtol=1e-4)
    assert repr(m) == "FactoredMatrix: Shape(torch.Size([2, 4, 16, 16])), Hidden Dim(4)"
    assert m.pair == (m.A, m.B)


def test_products_that_do_not_fit_are_refused():
    m = FactoredMatrix(torch.ones(5, 3), torch.ones(3, 6))
    for product in (lambda: m @ torch.ones(5, 2), lambda: torch.ones(2, 6) @ m, lambda: m.BA, lambda: m * torch.ones(2),
                    lambda: FactoredMatrix(torch.ones(5, 3), torch.ones(4, 6))):  # fmt: skip
        with pytest.raises(AssertionError) as refusal:
            product()
        assert isinstance(refusal.value, Mismatch)
    with pytest.raises(RuntimeError, match="Shape mismatch"):
        FactoredMatrix(torch.ones(2, 5, 3), torch.ones(4, 3, 6))
    with pytest.raises(ValueError, match="too long"):
        m[0, 0, 0]
