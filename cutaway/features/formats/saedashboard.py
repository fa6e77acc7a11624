"""SAEDashboard's batches, `batch-0.json` …, as Neuronpedia's importer takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cutaway.core.files import new_folder, write_json
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.features.formats.neuronpedia import BATCH, Export, Row, Writer
from cutaway.features.store.feature_store import FeatureStore
from cutaway.models.model import Model

#: keys of a feature that both formats have under one name
SHARED = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_pearson", "correlated_neurons_l1", "correlated_features_indices",
    "correlated_features_pearson", "correlated_features_l1", "neg_str", "neg_values", "pos_str", "pos_values",
    "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "decoder_weights_dist", "vector",
)  # fmt: skip
#: keys of an example here, and what they are called there
EXAMPLE = {
    "tokens": "tokens", "values": "values", "bin_min": "binMin", "bin_max": "binMax", "bin_contains": "binContains",
    "qualifying_token_index": "qualifyingTokenIndex",
}  # fmt: skip


@torch.no_grad()
def write_saedashboard(
    store: FeatureStore,
    out: str | Path,
    export: Export,
    model: Model,
    source: Dictionary,
    *,
    dictionary: str | None = None,
) -> Path:
    """Write a store as batches of SAEDashboard, and return their folder.

    Raises:
        Refused: a folder that holds something, or what `write_neuronpedia` refuses.
    """
    known, folder = store.latents(dictionary), new_folder(out)
    store.check(known, model, source)
    writer = Writer(store, known, export, model, source)
    for number, first in enumerate(range(0, len(known), BATCH)):
        rows = writer.batch(range(first, min(first + BATCH, len(known))))
        layer = int(writer.layer.partition("-")[0])
        batch: dict[str, Any] = {"model_id": export.model, "layer": layer, "sae_id_suffix": export.set}
        by_index: dict[str, list[Row]] = {}
        for row in rows["activations"]:
            by_index.setdefault(row["index"], []).append(row)
        features = [_feature(row, by_index.get(row["index"], [])) for row in rows["features"]]
        write_json(folder / f"batch-{number}.json", batch | {"features": features})
    return folder


def _feature(row: Row, examples: list[Row]) -> Row:
    own = {n: row[n] for n in SHARED}
    return (
        {"feature_index": int(row["index"])}
        | own
        | {"activations": [{ours: e[theirs] for ours, theirs in EXAMPLE.items()} for e in examples]}
    )
