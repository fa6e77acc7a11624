"""Probes of all layers at once: against scikit-learn's cross-validation, formulas by hand, and what a world knows."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cutaway as ca
from cutaway.directions.probe import BLOCKS, _code, _mixed
from cutaway.interventions import probes
from cutaway.interventions.text_vectors import text_vectors
from cutaway.tasks import Labelled, read_labelled
from tests.conformance.subjects import miniworld, random_llama
from tests.directions.test_find import labelled


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def found(model):
    return ca.directions.probe(model, labelled(), samples=2, mdl=True)


def test_accuracy_and_auroc_are_those_of_cross_validation_by_hand(model, found):
    data = labelled()
    y, group = data.shown[:, 0].numpy(), data.group_of.numpy()
    x = text_vectors(model, data.texts, "resid_post").vectors.numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    split = StratifiedGroupKFold(4, shuffle=True, random_state=0)
    for i in range(2):
        for j in range(2):
            odds = cross_val_predict(probe, x[i, j], y, groups=group, cv=split, method="decision_function")
            assert float(found.accuracy[i, j]) == pytest.approx(((odds > 0) == y).mean(), abs=1e-6)
            assert float(found.auroc[i, j]) == pytest.approx(roc_auc_score(y, odds), abs=2e-3)
    torch.testing.assert_close(found.selectivity, found.accuracy - found.control.mean(-1))
    best = (found.accuracy == found.accuracy.max()).nonzero()[0].tolist()
    assert found.best == (found.labels["reading"][best[0]], f"resid_post.{best[1]}")
    assert float(found.curve[-1]) == pytest.approx(float(found.accuracy.max()), abs=0.05)
    assert found.labels["step"] == [8, 16, 18]


def test_words_that_give_the_label_away_are_found_without_a_model(found):
    assert float(found.words) == 1.0
    assert float(found.majority) == 0.5
    assert float(found.words_curve[-1]) == 1.0
    assert 0.5 < float(found.words_interval[0]) < 1.0


def test_compression_is_the_length_of_the_online_code():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 3, generator=g), torch.arange(40) % 2 == 0
    x[:, 0] += 4.0 * y
    ends = sorted({max(1, math.ceil(b * 40)) for b in BLOCKS})
    bits = float(ends[0])
    for known, end in pairwise(ends):
        if y[:known].all() or not y[:known].any():
            bits += end - known
            continue
        a = x[:known].numpy()
        scale = a.std(0)
        scale[scale == 0] = 1
        fitted = LogisticRegression(C=0.1, max_iter=500).fit((a - a.mean(0)) / scale, y[:known].numpy())
        p = fitted.predict_proba((x[known:end].numpy() - a.mean(0)) / scale)
        bits -= np.log2(p[np.arange(end - known), y[known:end].long().numpy()]).sum()
    code = _code(x, y, probes.logistic_scores())
    assert code == pytest.approx(40 / bits, rel=1e-3)
    assert code > 1.2 > _code(torch.randn(40, 3, generator=g), y, probes.logistic_scores())


def test_every_beginning_of_a_mixed_order_has_both_classes():
    y = torch.arange(40) % 4 == 0
    order = _mixed(torch.randperm(40, generator=torch.Generator().manual_seed(0)), y)
    assert sorted(order.tolist()) == list(range(40))
    assert [int(y[order[:n]].sum()) for n in (8, 16, 32)] == [2, 4, 8]


def test_addresses_of_several_sites_are_places_of_their_own(model):
    both = ca.directions.probe(model, labelled(), sites=("attn_out.1", "resid_post.0"), readings=("last",), samples=1)
    assert both.grid == ("address",)
    assert both.labels["address"] == ["attn_out.1", "resid_post.0"]
    assert both.compression is None


@pytest.mark.parametrize("name", ["sentiment", "country", "refusal", "parity"])
def test_properties_of_a_world_are_read_beyond_words_chance_and_memory(name):
    model = miniworld()
    found = ca.directions.probe(
        model, read_labelled(f"world/{name}", model), sites=("resid_post.5",), readings=("last",), samples=2
    )
    low = float(found.interval[0, 0, 0])
    assert low > max(float(found.null.max()), float(found.words), float(found.majority), float(found.control.max()))
    assert float(found.selectivity_interval[0, 0, 0]) > 0
    assert float(found.curve[-1]) > float(found.words_curve[-1]) + 0.1


def test_a_model_without_training_reads_less_than_the_trained_one():
    model = miniworld()
    data = read_labelled("world/refusal", model)
    options = {"sites": ("resid_post.4",), "readings": ("last",), "samples": 1}
    trained, not_trained = (ca.directions.probe(m, data, **options) for m in (model, ca.models.shuffled(model)))
    assert float(not_trained.interval[0, 0, 1]) < float(trained.interval[0, 0, 0])


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        (lambda d: replace(d, shown=torch.ones_like(d.shown)), {}, "every text shows"),
        (lambda d: replace(d, groups=("one",) * len(d.texts)), {}, "of one group"),
        (lambda d: replace(d, texts=(" ", *d.texts[1:])), {}, "text 0 is empty"),
        (lambda d: d, {"strength": 0.0}, "divides the penalty"),
        (lambda d: d, {"sites": ("scores",)}, "not \\[batch, position, width\\]"),
    ],
)
def test_what_cannot_be_probed_is_refused(model, change, options, why):
    with pytest.raises(ca.Refused, match=why):
        ca.directions.probe(model, change(labelled()), samples=1, **options)


def test_texts_without_groups_are_groups_of_their_own(model):
    data = labelled(groups=False)
    assert isinstance(data, Labelled)
    found = ca.directions.probe(model, data, sites=("resid_post.1",), samples=1)
    assert found.record["texts"]["groups"] == len(data.texts)
    assert found.record["folds"] == 5
