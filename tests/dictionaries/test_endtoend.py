"""End-to-end objectives: the divergence against its definition, its slope, and a dictionary that is trained on it."""

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.dictionaries import Splice, objectives
from cutaway.dictionaries import training as train
from cutaway.dictionaries.training.endtoend import Divergence, Whole
from cutaway.models.edits.library import Replace

A, LATER = "resid_post.2", "resid_post.4"


@pytest.fixture(scope="module")
def model():
    return ca.load("miniworld")


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(5, 400, (12, 16), generator=torch.Generator().manual_seed(0))


def source(model, ids, **more):
    return Whole(model, ids, (A,), **({"rows": 4} | more))


def test_the_activation_itself_moves_nothing(model, ids):
    batch = next(source(model, ids, later=(LATER,)))
    for answer, floor in (("kl", 0.0), ("ce", None)):
        found = float(Divergence(model, answer, later=1.0)(batch.acts, batch))
        text = torch.nn.functional.cross_entropy(batch.logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten())
        assert found == pytest.approx(float(text) if floor is None else floor, abs=1e-5)


def test_the_divergence_is_that_of_an_edited_run(model, ids):
    batch = next(source(model, ids, later=(LATER,)))
    wrong = batch.acts[A] + 0.3 * torch.randn(batch.acts[A].shape, generator=torch.Generator().manual_seed(1))
    edit = Replace(A, wrong.view(4, 16, -1))
    found = model.capture(batch.ids, [LATER, "logits"], edits=edit)
    p, q = (x.log_softmax(-1) for x in (batch.logits, found["logits"]))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    true = batch.later[LATER]
    error = (found[LATER] - true).pow(2).mean() / (true - true.mean((0, 1))).pow(2).mean()
    got = Divergence(model, "kl", later=2.0)({A: wrong}, batch)
    assert float(got) == pytest.approx(float(kl + 2 * error), rel=1e-4)


def test_its_gradient_is_the_slope(model, ids):
    batch = next(source(model, ids))
    y = (batch.acts[A] * 0.8).requires_grad_()
    score = Divergence(model)
    (slope,) = torch.autograd.grad(score({A: y}, batch), y)
    way = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        up, down = (float(score({A: y + e * way}, batch)) for e in (1e-2, -1e-2))
    assert float((slope * way).sum()) == pytest.approx((up - down) / 2e-2, rel=0.02)
    assert all(p.grad is None for p in model.hf.parameters())


def test_a_dictionary_trained_end_to_end_disturbs_the_model_less(model, ids):
    term = objectives.Spliced(Divergence(model), weight=300.0)
    plan = train.Plan(tokens=4 * 16 * 24, select="float32", products="plain")
    recipes = [train.autoencoder(A, 96, train.TrainTopK(4), t, rate=1e-2) for t in ((), (term,))]
    recipes.append(train.autoencoder(A, 96, train.TrainTopK(4), (term,), rate=1e-2, squared=0.0))
    plain, spliced, pure = train.train(source(model, ids), recipes, plan)
    batch = next(source(model, ids))

    def moved(t):
        q = model.run(batch.ids, edits=Splice(t.dictionary)).log_softmax(-1)
        p = batch.logits.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert moved(spliced) < 0.95 * moved(plain)
    assert moved(pure) < 0.95 * moved(plain)
    assert spliced.dictionary.about["recipe"]["terms"][0]["score"].endswith("Divergence")


def test_too_many_contexts_a_batch_are_refused(model, ids):
    with pytest.raises(Refused, match="13 contexts"):
        source(model, ids, rows=13)
    with pytest.raises(Refused, match="cursor"):
        source(model, ids).restore({"rows": 2, "seed": 0, "number": 0})
