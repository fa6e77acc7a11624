"""Raw graphs: the matrix of all edges with the names of its rows, pruned and scored as circuit-tracer does."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core import graph as house
from cutaway.core.pt import Opaque, read_pt, write_pt
from cutaway.core.refuse import Refused
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.circuit_tracer import raw_graph
from cutaway.graphs.prune import node_numbers, prune


class LogitTarget(NamedTuple):
    """A target: its words and its token, or a number behind the vocabulary."""

    token_str: str
    vocab_idx: int


@dataclass(eq=False)
class Graph:
    """A raw graph. Its nodes are the selected features, errors by layer and position, tokens, and targets."""

    input_string: str
    input_tokens: Int[Tensor, "position"]
    active_features: Int[Tensor, "active 3"]  # layer, position, number
    adjacency_matrix: Float[Tensor, "node node"]  # target, source
    cfg: Any
    selected_features: Int[Tensor, "feature"]
    activation_values: Float[Tensor, "active"]
    logit_targets: list[Any]
    logit_probabilities: Float[Tensor, "target"]
    scan: Any = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        self.logit_targets = [LogitTarget(*target) for target in self.logit_targets]
        self.n_pos, self.vocab_size = len(self.input_tokens), self.vocab_size or self.cfg.d_vocab

    @cached_property
    def house(self) -> AttributionGraph:
        """The same graph as the house has it."""
        return raw_graph(vars(self))

    @property
    def logit_token_ids(self) -> Int[Tensor, "target"]:
        """The tokens of the targets."""
        return torch.tensor([target.vocab_idx for target in self.logit_targets])

    logit_tokens = logit_token_ids

    def to_pt(self, path: str | Path) -> None:
        """Write the graph as plain tensors, numbers and text."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: value for name, value in vars(self.cfg).items() if isinstance(value, str | int | float)}
        write_pt(path, held | {"cfg": plain, "logit_targets": [tuple(target) for target in self.logit_targets]})

    @staticmethod
    def from_pt(path: str | Path, map_location: Any = "cpu") -> Graph:
        """Read a graph, also one of circuit-tracer, without running code of the file.

        Raises:
            Refused: it holds something else.
        """
        held: dict[str, Any] = {"vocab_size": None, "scan": None} | read_pt(path, objects=True)
        if missing := [f.name for f in fields(Graph) if f.name not in held]:
            raise Refused(f"file {str(path)!r}", f"it holds no {missing[0]!r}", "give a raw graph of circuit-tracer")
        targets, cfg = held["logit_targets"], held["cfg"]
        targets = [("", i) for i in targets.reshape(-1).tolist()] if isinstance(targets, Tensor) else targets
        targets = [one.args if isinstance(one, Opaque) else one for one in targets]
        given = SimpleNamespace(**(cfg.state if isinstance(cfg, Opaque) else cfg))
        return Graph(**held | {"cfg": given, "logit_targets": targets})


class PruneResult(NamedTuple):
    """The nodes and edges that stay, and each node's cumulative share of influence."""

    node_mask: Bool[Tensor, "node"]
    edge_mask: Bool[Tensor, "node node"]
    cumulative_scores: Float[Tensor, "node"]


def prune_graph(graph: Graph, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PruneResult:
    """Return which nodes and edges hold these shares of the influence."""
    whole, kept = graph.house, pruned(graph, node_threshold, edge_threshold)
    place = {name: i for i, name in enumerate(whole.labels["node"])}
    nodes, n = torch.tensor([place[name] for name in kept.labels["node"]]), len(place)
    mask, edges = torch.zeros(n, dtype=torch.bool), torch.zeros(n, n, dtype=torch.bool)
    mask[nodes], edges[nodes[kept.target], nodes[kept.source]] = True, True
    return PruneResult(mask, edges, node_numbers(whole)["cumulative"])


def pruned(graph: Graph, node_threshold: float, edge_threshold: float) -> house.Graph:
    """Return the part that holds these shares of the influence, as the house has it."""
    return prune(graph.house, "circuit-tracer", nodes=node_threshold, edges=edge_threshold)


def compute_graph_scores(graph: Graph) -> tuple[float, float]:
    """Return the replacement and completeness scores."""
    return graph.house.scores("circuit-tracer")
