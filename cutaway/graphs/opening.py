"""Graphs in files, the labels that a store has for one, and what stands around one of its nodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.result import Result, open_result
from cutaway.features.store.dictionaries import dictionary_of
from cutaway.features.store.feature_store import FeatureStore
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.circuit_tracer import read_raw_graph
from cutaway.graphs.labels import store_labels
from cutaway.graphs.neuronpedia import read_graph

Edge = tuple[str, float, float]  # the node at its other end, its weight, and its share of all |edges| into its target


def open_graph(path: Path) -> Result:
    """Return the graph, or other result, that a file holds: .safetensors, or .pt and .json of circuit-tracer."""
    return {".json": read_graph, ".pt": read_raw_graph}.get(path.suffix, open_result)(path)


def labels_from(whole: AttributionGraph, store: FeatureStore) -> dict[str, str]:
    """Return the labels that a store has for the features of a graph, with the transcoders that were harvested.

    Raises:
        Refused: the graph's transcoders are not those of the store.
    """
    own = whole.record.get("subjects", {}).get("transcoders", {}).get("hash")
    name = next((n for n in store.names if store.latents(n).row["hash"] == own), None)
    if name is None:
        why = "none of its dictionaries is the one of the graph"
        raise Refused(f"labels of a graph from {str(store.folder)!r}", why, "harvest the graph's transcoders")
    return store_labels(whole, store, dictionary_of(store, name))


@dataclass(frozen=True)
class Around:
    """A node with the largest edges into it and out of it, in the whole graph.

    Attributes:
        node: its name.
        influence: on the targets, over all paths.
        null: the largest of its influences on random targets; None without a control.
        activation: of a unit; 0 of other nodes.
        value: what its inputs sum to; None of a node that reads nothing.
        inputs: the edges into it, the largest first.
        outputs: the edges out of it, the largest first.
    """

    node: str
    influence: float
    null: float | None
    activation: float
    value: float | None
    inputs: list[Edge]
    outputs: list[Edge]


def around(whole: AttributionGraph, node: str, most: int = 12) -> Around:
    """Return what stands around a node.

    Raises:
        Refused: no such node.
    """
    (at,) = whole.mask([node]).nonzero()[:, 0].tolist()
    names, rows = whole.labels["node"], (whole.node_of == at).nonzero()[:, 0].tolist()
    sizes = whole.weight.abs().sum(1).clamp_min(1e-30)
    row = rows[0] if rows else None
    inputs = [] if row is None else _largest(whole.weight[row], whole.weight[row].abs() / sizes[row], names, most)
    targets = [names[i] for i in whole.node_of.tolist()]
    column = whole.weight[:, at]
    return Around(
        node=node,
        influence=float(whole.influence[at]),
        null=None if whole.influence_null is None else float(whole.influence_null[at].max()),
        activation=float(whole.activation[at]),
        value=None if row is None else float(whole.value[row]),
        inputs=inputs,
        outputs=_largest(column, column.abs() / sizes, targets, most),
    )


def _largest(weight: Float[Tensor, "edge"], share: Float[Tensor, "edge"], names: list[str], most: int) -> list[Edge]:
    order = weight.abs().argsort(descending=True, stable=True)[: min(most, int(torch.count_nonzero(weight)))]
    return [(names[i], float(weight[i]), float(share[i])) for i in order.tolist()]
