"""Virtual weights and heads: what a component writes moves a later reader by their product."""

from __future__ import annotations

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models.model import Model
from cutaway.weights import virtual_head, virtual_pattern, virtual_weights
from tests.conformance import subjects


def model_of(family: str) -> Model:
    return subjects.random_llama() if family == "llama" else subjects.family("gpt2")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_products_are_what_the_norm_and_the_reader_make_of_what_is_written(family):
    model, g = model_of(family), torch.Generator().manual_seed(0)
    w, norm = model.weights, model.anatomy.norm(model.anatomy.part(1, "ln1"))
    z = torch.randn(model.shape.d_head, generator=g)
    seen = norm.linear(z @ w.o[0][2], torch.ones(()))  # through the norm of layer 1 with its scale left out
    for reader, weight in (("q.1.3", w.q[1][3]), ("v.1.1", w.v[1][1])):
        torch.testing.assert_close(z @ virtual_weights(model, "z.0.2", reader).matrix, seen @ weight)
    final = model.anatomy.norm(model.anatomy.top("final"))
    written = final.linear(w.mlp_out[0][5], torch.ones(()))
    torch.testing.assert_close(virtual_weights(model, "mlp_post.0.5", "logits").matrix[0], written @ w.unembed)
    second = model.anatomy.norm(model.anatomy.part(0, "ln2"))
    into = second.linear(w.embed[:3], torch.ones(3)) @ w.mlp_in[0]
    torch.testing.assert_close(virtual_weights(model, "embed", "mlp_pre.0").matrix[:3], into)
    assert virtual_weights(model, "z.0.1", "mlp_pre.0.4").matrix.shape == (model.shape.d_head, 1)


@torch.no_grad()
def test_a_virtual_head_is_two_circuits_in_a_row():
    model = model_of("llama")
    w = model.weights.folded()
    expected = w.ov(0, 1).matrix.double() @ w.ov(1, 2).matrix.double()
    torch.testing.assert_close(virtual_head(model, "0.1", "1.2").matrix.double(), expected, rtol=1e-4, atol=1e-5)
    acts = model.capture(subjects.llama_task().bind(model).clean, "pattern")
    both = virtual_pattern(acts["pattern.0"][:, 1], acts["pattern.1"][:, 2])
    torch.testing.assert_close(both.sum(-1), torch.ones_like(both[..., 0]))
    assert both.triu(1).abs().max() == 0
    x = torch.randn(both.shape[0], both.shape[-1], 3)
    torch.testing.assert_close(both @ x, acts["pattern.1"][:, 2] @ (acts["pattern.0"][:, 1] @ x))


@pytest.mark.parametrize(
    ("writer", "reader"),
    [("z.1.0", "q.0.0"), ("z.0.0", "q.0.1"), ("z.0.9", "q.1.0"), ("q.0.0", "logits"), ("z.0", "q.1.0"),
     ("mlp_post.0", "mlp_pre.7"), ("mlp_post.0.99", "logits"), ("mlp_post.0", "mlp_pre.0")],
)  # fmt: skip
def test_components_that_are_not_joined_are_refused(writer, reader):
    with pytest.raises(Refused):
        virtual_weights(model_of("llama"), writer, reader)
    with pytest.raises(Refused, match="does not come after"):
        virtual_head(model_of("llama"), "1.0", "0.1")
