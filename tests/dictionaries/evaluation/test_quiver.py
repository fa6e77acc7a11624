"""The quiver of probes: its choice by hand, each kind of probe on planted data, and what a world's dictionary adds."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.dictionaries.evaluation.quiver import CONTENDERS, _padded, _pooled, quiver
from cutaway.interventions import probe_kinds
from cutaway.interventions.probes import folds, logistic_scores
from cutaway.tasks import Labelled, read_labelled
from tests.conformance.subjects import dictionary, miniworld, random_llama
from tests.directions.test_find import labelled

FAST = ("mean difference", "logistic", "1 latent", "all latents", "reconstruction")


@pytest.fixture(scope="module")
def found():
    return quiver(random_llama(), dictionary(32), labelled(), probes=FAST, samples=2)


def test_the_choice_is_that_of_validation_and_the_gain_is_its_difference(found):
    data = labelled()
    y, group = data.shown[:, 0], data.group_of
    model = random_llama()
    x = torch.stack([model.capture(t, "resid_post.1", bos=True)["resid_post.1"][0, 1:].mean(0) for t in data.texts])
    parts = folds(y, group)
    each = []
    for fit, test in parts:
        a, scale = x[fit].mean(0), x[fit].std(0, correction=0)
        probe = LogisticRegression(C=0.1, max_iter=500).fit(((x[fit] - a) / scale).numpy(), y[fit].numpy())
        each.append(roc_auc_score(y[test], probe.decision_function(((x[test] - a) / scale).numpy())))
    assert float(found.auroc[1]) == pytest.approx(np.mean(each), abs=1e-4)
    assert float(found.gain) == pytest.approx(float(found.with_dictionary - found.without_dictionary), abs=1e-6)
    assert float(found.lost) == pytest.approx(float(found.auroc[1] - found.auroc[-1]), abs=1e-6)
    assert len(found.chosen) == len(parts)
    assert set(found.chosen) <= set(FAST) - {"reconstruction"}
    assert found.gain_null.shape == (2,)


def planted(n=120, width=8):
    """Rows whose class is in the first coordinate, but for a third of it."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 2 == 0
    x = torch.randn(n, width, generator=g)
    x[:, 0] += 3.0 * y
    return x, y


@pytest.mark.parametrize("name", [n for n, row in CONTENDERS.items() if row.reads in ("vectors", "latents")])
def test_every_probe_reads_what_is_planted_and_nothing_else(name):
    x, y = planted()
    scorer = CONTENDERS[name].scorer(0)
    scores = scorer(x[:80], torch.stack([y[:80], torch.zeros(80, dtype=torch.bool)]), x[80:])
    assert scores.shape == (2, 40)
    area = roc_auc_score(y[80:], scores[0])
    assert (area > 0.9) == (name != "random direction"), area
    if name not in ("mean difference", "random direction"):
        assert bool((scores[1] < 0).all())  # one class only: it says so


def test_attention_finds_the_one_token_that_matters():
    g = torch.Generator().manual_seed(1)
    y = torch.arange(120) % 2 == 0
    x = torch.randn(120, 6, 8, generator=g)
    x[:, :, 1] = 0.0
    where = torch.randint(0, 5, (120,), generator=g)
    x[torch.arange(120), where, 1] = 4.0  # the mark that is attended to
    x[torch.arange(120), where, 0] = 2.0 * (2.0 * y - 1)
    x[::3, 5] = torch.nan  # texts without a sixth token
    area = roc_auc_score(y[80:], probe_kinds.attention_scores(1.0)(x[:80], y[:80][None], x[80:])[0])
    mean = x.nanmean(1)
    plain = roc_auc_score(y[80:], logistic_scores()(mean[:80], y[:80][None], mean[80:])[0])
    assert area > 0.97 > plain


def test_vectors_of_texts_are_pooled_and_padded_by_text():
    x, text = torch.arange(10.0).reshape(5, 2), torch.tensor([0, 1, 0, 1, 1])
    torch.testing.assert_close(_pooled(x, text, "mean"), torch.tensor([[2.0, 3.0], [16 / 3, 19 / 3]]))
    assert _pooled(x, text, "last").tolist() == [[4.0, 5.0], [8.0, 9.0]]
    assert _padded(x, text)[0, :2].tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert bool(_padded(x, text)[0, 2].isnan().all())


def test_a_worlds_dictionary_loses_a_country_that_its_activations_show():
    model, latents = miniworld(), ca.dictionaries.load("miniworld/resid_post.3")
    probes = ("logistic", "1 latent", "16 latents", "reconstruction", "words")
    found = ca.dictionaries.quiver(model, latents, read_labelled("world/country", model), probes=probes)
    auroc = dict(zip(probes, found.auroc.tolist(), strict=True))
    assert auroc["logistic"] > max(auroc["1 latent"], auroc["16 latents"], auroc["words"], float(found.null.max()))
    assert float(found.lost_interval[0]) > 0
    assert float(found.gain) <= 0.0


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        ({}, {"probes": ("best",)}, "no such probe"),
        ({}, {"probes": ("logistic",)}, "none of them is on latents"),
        ({}, {"probes": ("1 latent",)}, "none of them is without"),
        ({"groups": ("one",) * 24}, {}, "of one group"),
        ({"shown": torch.ones(24, 1, dtype=torch.bool)}, {}, "every text shows"),
        ({}, {"concept": "river"}, "labelled with park"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, options, why):
    data = labelled()
    data = Labelled(data.texts, data.concepts, change.get("shown", data.shown), change.get("groups", data.groups))
    with pytest.raises(Refused, match=why):
        quiver(random_llama(), dictionary(32), data, **{"probes": FAST, **options})


def test_a_dictionary_of_two_sites_is_refused():
    transcoders = ca.dictionaries.load("miniworld/transcoders")
    with pytest.raises(Refused, match="give an autoencoder"):
        quiver(miniworld(), transcoders, labelled(), probes=FAST)
