"""Virtual weights of any two components: the plain formula, rotated streams, and pairs planted by hand."""

from __future__ import annotations

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.weights import connections, virtual_weights
from tests.conformance import subjects

WRITERS = ("z.0.2", "z.1.0", "mlp_post.0", "mlp_post.0.5", "embed")
READERS = ("q.1.3", "v.1.1", "mlp_pre.0", "mlp_pre.1.7", "logits")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_scores_and_z_are_the_plain_formula_on_virtual_weights(family):
    model = subjects.random_llama() if family == "llama" else subjects.family("gpt2")
    n = model.shape.d_model - (family == "gpt2")
    got = connections(model, writers=WRITERS, readers=READERS)
    eye = [virtual_weights(model, "embed", r).right.double() for r in READERS]
    for i, writer in enumerate(WRITERS):
        for j, reader in enumerate(READERS):
            try:
                whole = virtual_weights(model, writer, reader)
            except Refused:
                assert got.score[i, j].isnan(), (writer, reader)
                continue
            a, b = whole.left.double(), eye[j]
            score = (a @ b).norm() / (a.norm() * b.norm())
            p, q = a.T @ a / a.square().sum(), b @ b.T / b.square().sum()
            spread = [float(x.square().sum()) - 1 / n for x in (p, q)]
            z = (score**2 - 1 / n) / (2 * spread[0] * spread[1] / ((n - 1) * (n + 2))) ** 0.5
            assert float(got.score[i, j]) == pytest.approx(float(score), rel=1e-4), (writer, reader)
            assert float(got.z[i, j]) == pytest.approx(float(z), rel=1e-3, abs=1e-3), (writer, reader)
    assert got.score.isnan().sum() == 5, "readers that come first"
    assert got.record["dimensions"] == n


@torch.no_grad()
def test_drawn_z_are_those_of_whole_streams_that_were_rotated():
    model, n = subjects.random_llama(), 600
    got = connections(model, writers=("z.0.1", "mlp_post.0.3"), readers=("q.1.2", "mlp_pre.1"), samples=n)
    turns = torch.linalg.qr(torch.randn(n, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    a, b = (getattr(virtual_weights(model, "z.0.1", "q.1.2"), side).double() for side in ("left", "right"))
    square = (a @ turns @ b).square().sum((-2, -1)) / (a.square().sum() * b.square().sum())
    theirs = (square - 1 / 32) / square.std()
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double()
    drawn = got.null[0, 0].double()
    torch.testing.assert_close(drawn.quantile(quantiles), theirs.quantile(quantiles), rtol=0.2, atol=0.2)
    assert (got.null.mean(-1).abs() < 0.2).all(), "z has mean 0 whatever the ranks"
    assert ((got.null.std(-1) - 1).abs() < 0.3).all(), "and deviation 1"


@torch.no_grad()
def test_planted_pairs_of_every_kind_are_first():
    model, g = subjects.random_llama(spread=1.0), torch.Generator().manual_seed(1)
    first, then = model.hf.model.layers
    line = torch.randn(32, generator=g)
    first.mlp.down_proj.weight[:, 5] = line  # neuron 0.5 writes what neuron 1.9 and the queries of 1.1 read
    then.mlp.up_proj.weight[9] = line
    then.self_attn.q_proj.weight[8:16] += 0.1 * torch.randn(8, 1, generator=g) * line
    written = torch.randn(32, 8, generator=g)
    first.self_attn.o_proj.weight[:, 8:16] = written  # head 0.1 writes what neuron 1.3 reads
    then.mlp.up_proj.weight[3] = written @ torch.randn(8, generator=g)
    got = connections(model, writers=("z.0.*", "mlp_post.0.*"), readers=("q.1.*", "mlp_pre.1.*"))
    best = {(r["writer"], r["reader"]) for r in got.top(2, by="z", largest=True)}
    assert ("mlp_post.0.5", "mlp_pre.1.9") in best
    heads = got.select(reader="q.1.1")
    assert heads.labels["writer"][int(heads.z[:, 0].argmax())] == "mlp_post.0.5"
    neurons = got.select(reader="mlp_pre.1.3")
    assert neurons.labels["writer"][int(neurons.z[:4, 0].argmax())] == "z.0.1"
    assert float(got.score[4 + 5, 4 + 9]) == pytest.approx(1, abs=1e-4)


def test_components_that_do_not_write_or_read_are_refused():
    model = subjects.random_llama()
    for wrong in ({"writers": ("q.0.0",)}, {"readers": ("z.0.0",)}, {"writers": ("z.0",)}, {"readers": ("q.9.0",)},
                  {"writers": ("mlp_post.0@1",)}, {"writers": ("resid_post.0",)}):  # fmt: skip
        with pytest.raises(Refused):
            connections(model, **wrong)
    with pytest.raises(Refused, match="encoder"):
        connections(subjects.family("bert"))
