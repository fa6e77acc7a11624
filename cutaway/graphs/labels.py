"""Labels of a graph's features from a store: the rules that were found for them, or what people and models wrote."""

from __future__ import annotations

from cutaway.core.address import parse
from cutaway.core.node import Latent
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.meta import NONE
from cutaway.graphs.attribution_graph import AttributionGraph


def store_labels(whole: AttributionGraph, store: FeatureStore, transcoders: Dictionary) -> dict[str, str]:
    """Return the labels that a store has for the features of a graph, by node, for pictures and files.

    A feature has its first label: people's before rules. One for which no short rule holds has none.

    Raises:
        Refused: transcoders that are not those of the graph, or that the store was not harvested with.
    """
    own, traced = transcoders.fingerprint(), whole.record.get("subjects", {}).get("transcoders", {}).get("hash")
    what = f"labels of a graph from {str(store.folder)!r}"
    if traced not in (None, own):
        raise Refused(what, f"the graph is over other transcoders than {transcoders!r}", "give its own")
    name = next((n for n in store.names if store.latents(n).row["hash"] == own), None)
    if name is None:
        raise Refused(what, f"it was not harvested with {transcoders!r}", "harvest these transcoders")
    labels = dict[int, str]()
    for label in store.meta.labels(name):
        if not label.text.startswith(NONE):
            labels.setdefault(label.latent, label.text)
    first = layer_starts(transcoders)
    numbers = {str(n): first[n.block] + n.index for n in whole.nodes if isinstance(n, Latent)}
    return {node: labels[number] for node, number in numbers.items() if number in labels}


def layer_starts(transcoders: Dictionary) -> dict[int | None, int]:
    """Return the number of each layer's first latent among all latents of transcoders."""
    each = zip(transcoders.blocks, transcoders.starts, strict=False)
    return {parse(block.reads[0]).layer: start for block, start in each}
