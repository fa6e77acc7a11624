"""Probes and directions of a real model: sentiment and register, at all layers, on groups that were not fitted on.

The texts were fixed before anything was measured. Templates of sentiment have adjectives of their own, and acts of
speech (asking, refusing …) phrases of their own, so that words alone give little away.
"""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.interventions.text_vectors import text_vectors
from cutaway.tasks import read_labelled
from tests.real import sets
from tests.real.written import Measure, measure

PROBES = "probes of all layers"
FOUND = "directions found"
PROPERTIES = ("sentiment", "register")
FINDERS = ("mean_difference", "logistic", "ridge", "reading_vector", "pca_centred_pairs")

pytestmark = pytest.mark.parametrize("name", ["smollm2"], indirect=True)


@pytest.fixture(params=PROPERTIES)
def labelled(request, model):
    """The texts of a property."""
    return read_labelled(sets.FOLDER / "labelled" / f"{request.param}.jsonl", model)


def test_vectors_are_those_of_plain_transformers(model):
    texts = [row["text"] for row in sets.rows("labelled/register")[:6]]
    found = text_vectors(model, texts, "resid_post", batch=48).vectors
    for i, text in enumerate(texts):
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model.hf(ids, output_hidden_states=True).hidden_states
        for layer in range(model.shape.n_layers - 1):  # behind the last one stands the final norm
            x = hidden[layer + 1][0]
            torch.testing.assert_close(found[1, layer, i], x[-1], atol=2e-2, rtol=1e-3)
            torch.testing.assert_close(found[0, layer, i], x[1:].mean(0), atol=2e-2, rtol=1e-3)


def test_probes_read_more_than_words_chance_and_memory(model, labelled, results, request):
    what = request.node.callspec.params["labelled"]
    found = ca.directions.probe(model, labelled, samples=2)
    best = dict(zip(("reading", "layer"), (found.best[0], int(found.best[1].split(".")[1])), strict=True))
    results.row(
        PROBES, f"{what}, best: {found.best[0]}, layer {best['layer']}", len(labelled.texts), **_cells(found, **best)
    )
    for reading, layer in (("mean", 0), ("last", 0), ("last", model.shape.n_layers - 1)):
        cells = _cells(found, reading, layer)
        results.row(PROBES, f"{what}, {reading}, layer {layer}", len(labelled.texts), **cells)
    cell = found.select(**best)
    assert float(cell.interval[0, 0, 0]) > max(float(cell.null.max()), float(found.words), float(found.majority))
    assert float(cell.selectivity_interval[0, 0, 0]) > 0


def _cells(found: ca.directions.Probes, reading: str, layer: int) -> dict[str, Measure]:
    cell = found.select(reading=reading, layer=layer)
    return {
        "accuracy": measure(cell.accuracy[0, 0], cell.interval[0, 0], cell.null),
        "AUROC": measure(cell.auroc[0, 0], cell.auroc_interval[0, 0], cell.auroc_null),
        "selectivity": measure(cell.selectivity[0, 0], cell.selectivity_interval[0, 0]),
        "words alone": measure(found.words, found.words_interval),
    }


def test_directions_order_texts_of_other_groups(model, labelled, results, request):
    what = request.node.callspec.params["labelled"]
    sites = [f"resid_post.{i}" for i in (5, 11, 17, 23)]
    found = ca.directions.find(model, labelled, sites=sites, readings=("mean",), finders=FINDERS, samples=2)
    for f, finder in enumerate(FINDERS):
        j = int(found.auroc[f, 0].argmax())
        auroc = measure(found.auroc[f, 0, j], found.interval[f, 0, j], found.null[f, 0, j])
        cosine = {"value": float(found.cosine[f, 0, j])}
        results.row(FOUND, f"{what}, {finder}", len(labelled.texts), AUROC=auroc, cosine=cosine)
    assert float(found.interval[0, 0, :, 0].max()) > 0.5
