"""Geometry of real models: concepts of the unembedding, features of prompts, and two models on the same text.

Words, prompts and text were fixed before anything was measured, and what does not come out is written down as it is.
"""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.geometry import encode, of_vocabulary
from cutaway.geometry.properties import ORDER
from cutaway.tasks.prompts import Prompts
from tests.real import sets
from tests.real.conftest import REAL
from tests.real.written import measure

CONCEPTS = "concepts in the unembedding"
COSINES = "cosines between concepts"
DIRECTIONS = "directions of the vocabulary"
FEATURES = "features of a prompt"
TWO = "two models on the same text"

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
PLACES = {"garden": 0, "park": 0, "street": 0, "forest": 0, "kitchen": 1, "office": 1, "school": 1, "museum": 1}


def test_concepts_have_directions(model, name, results):
    found = ca.geometry.concepts(model, ca.tasks.concepts("capital,language,plural,past,more,woman,bad"), samples=40)
    concepts = found.labels["concept"]
    for i, concept in enumerate(concepts):
        alignment = measure(found.alignment[i], found.interval[i], found.null[i])
        plain = {"value": float(found.plain_alignment[i]), "control": _range(found.plain_alignment_null[i])}
        results.row(CONCEPTS, concept, found.record["pairs"][concept], cosine=alignment, plain=plain)
    clear = found.interval[:, 0] > found.null.amax(1)
    assert {c for c, yes in zip(concepts, clear.tolist(), strict=True) if yes} >= {*concepts} - {"woman"}, name
    share_words = {("capital", "language"), ("language", "capital")}
    apart = torch.tensor([[a != b and (a, b) not in share_words for b in concepts] for a in concepts])
    for what, own, null in (("causal product", found.cosine, found.cosine_null),
                            ("as stored", found.plain_cosine, found.plain_cosine_null)):  # fmt: skip
        size = own[apart].abs()
        rows = {"mean": {"value": float(size.mean()), "control": _range(null[apart].abs().mean(0))},
                "largest": {"value": float(size.max()), "control": _range(null[apart].abs().amax(0))}}  # fmt: skip
        results.row(COSINES, what, int(apart.sum()) // 2, **rows)


def _range(x: torch.Tensor) -> list[float]:
    return [float(x.min()), float(x.max())]


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_directions_of_the_vocabulary_interfere(model, results):
    for what, centred in (("as stored", False), ("mean taken out", True)):
        found = ca.geometry.dimensionality(of_vocabulary(model), centred=centred, samples=2)
        nearest = measure(found.mean_nearest, found.mean_nearest_interval, found.null.mean(0))
        spread = {"value": float(found.spread.mean()), "control": _range(found.spread_null.mean(0))}
        total = {"value": float(found.total), "control": _range(found.total_null)}
        bounds = {"value": found.welch}
        results.row(DIRECTIONS, what, found.directions, nearest=nearest, spread=spread, welch=bounds, total=total)
        assert float(found.spread.mean()) > float(found.spread_null.mean(0).max())
        assert float(found.total) < float(found.total_null.min())
        assert float(found.mean_nearest_interval[0]) > float(found.null.mean(0).max())


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_features_of_a_prompt_have_properties(model, results):
    rows = [(p, place, n) for p in ("Mary", "Anna", "John", "Peter") for place in PLACES for n in range(12)]
    texts = tuple(f"{p} went to the {place} and saw {NUMBERS[n]}" for p, place, n in rows)
    values = {
        "number": [n + 1 for *_, n in rows],
        "woman": [p in ("Mary", "Anna") for p, *_ in rows],
        "inside": [PLACES[place] for _, place, _ in rows],
    }
    for layer in (8, 16, 24):
        one = encode(model, Prompts(texts), values, f"resid_post.{layer}")
        found = ca.geometry.properties(one, samples=40)
        for k, asked in enumerate(ORDER):
            statistic = measure(found.statistic[k], found.interval[k], found.null[k])
            verdict = {"verdict": {"value": v}} if (v := float(found.verdict[k])) == v else {}
            results.row(FEATURES, f"block {layer}: {asked}", len(rows), statistic=statistic, **verdict)
        assert found.words()["decomposable"] == "yes"
        assert found.words()["linear"] == "no", "numbers in words are no magnitudes along a line"
        assert found.record["worst"]["linear"] == "number"


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_two_models_share_more_than_words_in_another_order(model, results):
    parts = (p for text in sets.docstrings() for p in text.split("\n\n"))
    paragraphs = [" ".join(p.split()) for p in parts if len(p.split()) > 20]
    gemma = ca.load(REAL / "gemma3", check=False)
    found = {
        "Gemma 3 270M": ca.geometry.similarity(model, gemma, paragraphs, layers=3, samples=3),
        "shuffled weights": ca.geometry.similarity(model, ca.models.shuffled(model), paragraphs, layers=3, samples=3),
    }
    for what, one in found.items():
        for i in range(3):
            cka = measure(one.cka[i, i], one.interval[i, i], one.null[i, i])
            svcca = {"value": float(one.svcca[i, i]), "control": _range(one.svcca_null[i, i])}
            matched = {"value": float(one.matched[i, i]), "control": _range(one.rotated_null[i, i])}
            blocks = f"{one.labels['layer'][i]} and {one.labels['other_layer'][i]}"
            results.row(TWO, f"{what}: blocks {blocks}", one.record["words"], cka=cka, svcca=svcca, matched=matched)
            assert float(one.svcca[i, i]) > float(one.svcca_null[i, i].max())
    cka, null, interval = (getattr(found["Gemma 3 270M"], name) for name in ("cka", "null", "interval"))
    assert all(float(cka[i, i]) > float(null[i, i].max()) for i in range(3))
    assert all(float(interval[i, i, 0]) > float(null[i, i].max()) for i in (0, 2)), "the middle one turns on few words"
    assert bool((found["Gemma 3 270M"].svcca.diagonal() > found["shuffled weights"].svcca.diagonal())[1:].all())
