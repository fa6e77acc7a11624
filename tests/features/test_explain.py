"""Rules: planted features are found and scored exactly; random ones have none; labels go into the store."""

from __future__ import annotations

import shutil
from functools import cache

import numpy as np
import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.features import FeatureStore, explain
from cutaway.features.rules.families import FAMILIES, Corpus
from cutaway.features.rules.mine import Miner, Rule, chance_f1, measures
from tests.features.common import made, texts

WORDS = [
    a + b + c for a in ("be", "de", "fe", "ge", "he", "ke") for b in ("la", "mo", "ru") for c in ("ing", "ent", "ous")
]
STRINGS = [*WORDS, *(str(i) for i in range(20)), "A", "Bo", "THE", "OF", ",", ".", ";", " ", "x", "yz"]


@cache
def corpus() -> Corpus:
    """Random tokens, some of them as often as Zipf has it, in 400 documents of one context each."""
    g = np.random.default_rng(0)
    weights = 1 / (2 + g.permutation(len(STRINGS)))
    ids = g.choice(len(STRINGS), (400, 64), p=weights / weights.sum())
    document = np.repeat(np.arange(400), 64)
    return Corpus(ids, np.arange(ids.size), document % 2 == 1, document, STRINGS)


def planted(rule: Rule, miner: Miner, g: np.random.Generator) -> np.ndarray:
    """A latent that misses a fifth of what a rule fires on, and fires on a few other tokens."""
    rows = np.arange(len(corpus().rows))
    return (miner.fires(rule, rows) & (g.random(len(rows)) > 0.2)) | (g.random(len(rows)) < 2e-4)


CASES = {
    "token": [4, 17, 55],
    "previous": [9],
    "before": [11],
    "bigram": [],
    "suffix": [],
    "class": [1],
    "repeated": [2],
    "position": [3],
}


@pytest.mark.parametrize("family", list(CASES))
def test_a_planted_family_is_found_and_scored(family):
    g = np.random.default_rng(1)
    miner = Miner(corpus(), g)
    literals = CASES[family]
    if family == "bigram":
        values, counts = np.unique(corpus().codes("bigram"), return_counts=True)
        literals = values[(counts > 60) & (values >= 0)][:1].tolist()
    if family == "suffix":
        literals = [int(corpus().codes("suffix")[corpus().ids.ravel() == STRINGS.index("belaing")][0])]
    truth = Rule(family, tuple(literals), 0.0)
    active = planted(truth, miner, g)
    rule = miner.rule(active)
    assert rule is not None
    assert rule.family == family
    assert set(literals) <= set(rule.literals) if family != "repeated" else 2 in rule.literals
    counts = miner.counts(rule, active)
    precision, recall, f1, auroc = measures(counts.sum(0))
    rows = miner.score
    fires, real = miner.fires(rule, rows), active[rows]
    assert recall == pytest.approx((fires & real).sum() / real.sum())
    assert precision == pytest.approx((fires & real).sum() / fires.sum())
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert auroc == pytest.approx((1 + recall - (fires & ~real).sum() / (~real).sum()) / 2)
    assert f1 > 0.75
    low, high = miner.interval(counts, 200)[2]
    assert low < f1 < high < low + 0.25
    assert counts.sum() == len(rows)


def test_a_rule_about_documents():
    g, ids = np.random.default_rng(2), corpus().ids.copy()
    rare = STRINGS.index("yz")
    ids[ids == rare] = 0
    topical = g.random(400) < 0.15
    ids[topical, 3] = rare
    text = Corpus(ids, corpus().rows, corpus().held_out, corpus().document, STRINGS)
    miner = Miner(text, g)
    active = topical[text.document] & (g.random(ids.size) < 0.8)
    rule = miner.rule(active)
    assert rule is not None
    assert (rule.family, rule.literals) == ("document", (rare,))
    assert measures(miner.counts(rule, active).sum(0))[2] > 0.8
    assert rule.says(text) == "in documents that hold “yz”"


@pytest.mark.parametrize("density", [4e-4, 4e-3, 0.03, 0.3])
def test_random_features_have_no_rule(density):
    g = np.random.default_rng(3)
    miner = Miner(corpus(), g)
    rules = [miner.rule(g.random(len(corpus().rows)) < density) for _ in range(25)]
    assert sum(r is not None for r in rules) <= 4, "5 % of 25, with a margin of twice its standard deviation"


def test_chance_is_the_mean_of_permuted_latents():
    g = np.random.default_rng(4)
    real, fires = g.random(4000) < 0.2, g.random(4000) < 0.3
    found = []
    for _ in range(300):
        drawn = g.permutation(real)
        counts = np.array([(drawn & fires).sum(), (~drawn & fires).sum(), (drawn & ~fires).sum(), 0])
        counts[3] = 4000 - counts.sum()
        found.append(measures(counts)[2])
    assert chance_f1(counts) == pytest.approx(np.mean(found), abs=3 * np.std(found) / 300**0.5)
    assert chance_f1(np.array([0, 0, 7, 93])) == 0


def test_families_by_hand():
    c = Corpus(
        np.array([[3, 5, 3, 5, 7], [70, 0, 0, -1, -1]]), np.arange(7), np.zeros(7, bool), np.zeros(7, int), STRINGS
    )
    assert c.codes("previous").tolist() == [-1, 3, 5, 3, 5, -1, 70]
    assert c.codes("before").tolist() == [-1, -1, 3, 5, 3, -1, -1]
    assert c.codes("repeated").tolist() == [0, 0, 1, 2, 0, 0, 0]
    assert c.codes("position").tolist() == [0, 1, 2, 3, 4, 0, 1]
    names = ["white space", "digits", "punctuation", "capitals", "a capital first", "small letters"]
    for text, name in ((" ", 0), ("12", 1), (";", 2), ("THE", 3), ("Bo", 4), ("A", 4), ("x", 5)):
        assert FAMILIES["class"].says(c, [name]) == f"the token is {names[name]}"
        one = Corpus(np.array([[STRINGS.index(text)]]), np.arange(1), np.zeros(1, bool), np.zeros(1, int), STRINGS)
        assert one.codes("class").tolist() == [name]
    suffix = Rule("suffix", (int(c.codes("suffix")[0]),), 0.0)
    assert suffix.says(c) == f"the word ends in “{STRINGS[3][-3:]}”"
    assert Rule("bigram", (3 * len(STRINGS) + 5,), 0.0).says(c) == f"at the end of “{STRINGS[3]}{STRINGS[5]}”"
    assert Rule("previous", (-1, 3), 0.0).says(c) == f"after the beginning of a context or “{STRINGS[3]}”"
    assert Rule("position", (0, 8), 0.0).says(c) == "at position 0 or 8 or later"


def test_measures_of_what_never_fires():
    assert measures(np.array([0, 0, 7, 93])).tolist() == [0, 0, 0, 0.5]
    assert measures(np.array([5, 0, 0, 95])).tolist() == [1, 1, 1, 1]


def test_labels_are_written_into_the_store(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "copy")
    copy = FeatureStore(tmp_path / "copy")
    found = explain(copy, dictionary="few", resamples=50)
    assert found.interval.shape == (*found.score.shape, 2)
    assert bool((found.interval[..., 0] <= found.score).all() and (found.score <= found.interval[..., 1]).all())
    labels = copy.meta.labels("few")
    assert [f"{x.latent}: {x.text}" for x in labels] == found.labels["latent"]
    for row, label in zip(found.score, labels, strict=True):
        assert label.scores["F1"] == pytest.approx(float(row[2]))
        none = label.text.startswith("no short rule (best F1")
        beyond = max(0.2, label.scores["F1 by chance"], *label.scores["F1 of random features"])
        assert none == (label.scores["F1 interval"][0] <= beyond)
    assert {x.text.startswith("no short rule") for x in labels} == {True, False}, "random latents read some tokens"
    again = explain(copy, [3, 5], dictionary="few", write=False, resamples=50)
    assert [n.split(":")[0] for n in again.labels["latent"]] == ["3", "5"]
    same = explain(copy, [3, 5], dictionary="few", write=False, resamples=50)
    assert torch.equal(again.score, same.score)
    assert torch.equal(again.null, same.null)


def test_rules_that_cannot_be_found_are_refused(store, tmp_path):
    alone = made(tmp_path / "a", texts()[:1])
    with pytest.raises(Refused, match="to explain and"):
        explain(alone, dictionary="some")
    with pytest.raises(Refused, match="its control"):
        explain(store, dictionary="some", samples=0)
    with pytest.raises(Refused, match="no such latent"):
        explain(store, [99], dictionary="some")
