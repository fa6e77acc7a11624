"""Erasure: the closed form, what probes read afterwards, orthogonal weights against edits, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import cutaway as ca
from cutaway.core.stats import generator
from cutaway.interventions.erasure import leace, mean_projection, projection, rank_ablation
from cutaway.models.edits.rewrites import open_rewrites, rewritten, save_rewrites
from cutaway.tasks.labelled import Labelled
from tests.conformance.subjects import family, miniworld, random_llama
from tests.directions.made import reviews, seeded


def classes(texts: int = 90, width: int = 20, number: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated vectors, of classes that differ in their means, and a column of labels per class."""
    g = generator(3)
    z = torch.eye(number)[torch.randint(number, (texts,), generator=g)]
    x = torch.randn(texts, width, generator=g) @ torch.randn(width, width, generator=g)
    return (x + 3 * z @ torch.randn(number, width, generator=g)).double(), z


@pytest.mark.parametrize("number", [2, 3, 5])
def test_leace_is_its_closed_form_and_leaves_no_covariance_with_any_class(number):
    x, z = classes(number=number)
    away, labels = x - x.mean(0), z.double() - z.double().mean(0)
    sigma, cross = away.T @ away / len(x), away.T @ labels / len(x)
    values, vectors = torch.linalg.eigh(sigma)
    w = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    u, s, _ = torch.linalg.svd(w @ cross, full_matrices=False)
    u = u[:, s > 0.01]
    reference = x - away @ (torch.linalg.pinv(w) @ u @ u.T @ w).T
    assert_close(leace(x, z, shrink=False)(x), reference, atol=1e-6, rtol=0)
    for shrink in (True, False):
        erased = leace(x, z, shrink)(x)
        assert float(((erased - erased.mean(0)).T @ labels / len(x)).abs().max()) < 1e-9
        assert torch.linalg.matrix_rank(erased - x, rtol=1e-6) == number - 1


def test_erasers_take_out_what_they_say():
    x, z = classes(number=2)
    y = z[:, 0].bool()
    gap = torch.nn.functional.normalize(x[y].mean(0) - x[~y].mean(0), dim=0)
    assert_close(projection(x, y)(x) @ gap, torch.zeros(len(x)).double(), atol=1e-9, rtol=0)
    assert_close(mean_projection(x, y)(x) @ gap, (x.mean(0) @ gap).expand(len(x)), atol=1e-9, rtol=0)
    changed = rank_ablation(3)(x, y)(x) - x
    assert torch.linalg.matrix_rank(changed, rtol=1e-6) == 3
    with pytest.raises(ca.Refused, match="same mean"):
        projection(torch.zeros(4, 3), torch.tensor([True, False, True, False]))


def labelled(n: int) -> Labelled:
    """Reviews of the bundled model's world, in pairs of opposites that are groups."""
    positive, negative = reviews(n, "any")
    shown = torch.tensor([[True]] * n + [[False]] * n)
    return Labelled((*positive, *negative), ("positive",), shown, tuple(map(str, [*range(n)] * 2)))


def test_sentiment_of_a_trained_model_is_read_before_leace_and_not_after():
    got = ca.directions.erase(
        miniworld(), labelled(100), sites=("resid_post.3",), erasers=("leace", "projection", "mean"), samples=2
    )
    before, erased, _, nothing = range(4)
    assert float(got.linear[before]) > 0.9
    assert float(got.mlp[before]) > 0.9
    assert float(got.interval[erased, 0, 0]) <= 0.5 <= float(got.interval[erased, 0, 1])
    assert float(got.linear[nothing]) == 0.5
    assert float(got.mlp[nothing]) == 0.5
    assert float(got.moved[before]) == float(got.kl[before]) == 0.0
    assert 0 < float(got.moved[erased]) < 0.5
    assert float(got.moved[nothing]) == pytest.approx(1.0, abs=1e-5)
    assert float(got.mlp_interval[erased, 0, 0]) > 0.5  # what is not linear stays
    assert 0 < float(got.kl[erased]) < float(got.kl[nothing])


def test_orthogonal_weights_are_projections_at_all_that_writes(tmp_path):
    model = random_llama()
    direction = ca.directions.direction({"resid_pre.0": seeded(5, 32)}, "drawn")
    rewrites = open_rewrites(save_rewrites(tmp_path / "a", *ca.directions.orthogonalised(model, direction)))
    prompt = "Mary and John went to the store"
    edits = direction.at("resid_pre.0", "attn_out", "mlp_out", model=model).project_out()
    wanted, before = model.run(prompt, edits=edits), model.run(prompt)
    unit = torch.nn.functional.normalize(direction.vector[0], dim=0)
    with rewritten(model, *rewrites):
        assert_close(model.run(prompt), wanted, atol=1e-4, rtol=1e-4)
        stream = model.capture(prompt, "resid_post")["resid_post"]
        assert float((stream @ unit).abs().max()) < 1e-5 * float(stream.norm(dim=-1).max())
        for i in range(model.shape.n_layers):
            assert float((model.weights.o[i].detach() @ unit).abs().max()) < 1e-5
            assert float((model.weights.mlp_out[i].detach() @ unit).abs().max()) < 1e-5
    assert torch.equal(model.run(prompt), before)
    assert float((wanted - before).abs().max()) > 0.1


@pytest.mark.parametrize(("name", "match"), [("gpt2", "tied|positions"), ("gemma2", "tied|normed")])
def test_weights_that_cannot_be_orthogonalised_are_refused_by_name(name, match):
    model = family(name)
    direction = ca.directions.direction({"resid_pre.0": seeded(0, model.shape.d_model)})
    with pytest.raises(ca.Refused, match=match):
        ca.directions.orthogonalised(model, direction)


def test_tied_embeddings_several_vectors_and_unknown_erasers_are_refused():
    model = random_llama()
    one = ca.directions.direction({"resid_pre.0": seeded(0, 32)})
    two = ca.directions.direction({f"resid_pre.{i}": seeded(i, 32) for i in range(2)})
    with pytest.raises(ca.Refused, match="several vectors"):
        ca.directions.orthogonalised(model, two)
    model.hf.lm_head.weight = model.hf.model.embed_tokens.weight
    with pytest.raises(ca.Refused, match="tied to the unembedding"):
        ca.directions.orthogonalised(model, one)
    with pytest.raises(ca.Refused, match="nothing is erased so"):
        ca.directions.erase(random_llama(), labelled(4), erasers=("magic",))
    with pytest.raises(ca.Refused, match="every text shows"):
        ca.directions.erase(random_llama(), Labelled(("a b", "c d"), ("x",), torch.ones(2, 1, dtype=torch.bool)))
