"""The result of a traced prompt: every edge between its units, errors, tokens, constants and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.node import Node, layer_of, parse_edge, parse_node
from cutaway.core.result import Result
from cutaway.graphs.influence import Kind, circuit_tracer_scores, kind_of, masks

_LEAST = 9  # random targets: with fewer, chance alone puts a node above all of them in more than one case of ten


@dataclass(frozen=True, kw_only=True)
class AttributionGraph(Result, kind="attribution_graph"):
    """The attribution graph of one prompt: rows of edges that sum to what they explain.

    `weight[t, s]` is the part of target t's value that it reads of node s. `labels["node"]` and `labels["target"]` are
    the names of both. `prune` makes the graph that a picture shows.

    Attributes:
        influence: of each node on the targets, over all paths (Σ over paths of normalised |edges|, times the targets'
            weights).
        influence_null: the same with random targets in place of the graph's own.
        excess: `influence` less the largest of its null: what exceeds every random target is positive.
        weight: the edges.
        node_of: the node that each target is.
        activation: the activation of each unit; 0 of other nodes.
        value: what each row sums to: a pre-activation, a neuron's activation, or a logit less the mean.
        residual: value − sum of the row.
        share: the weight of each target in influences: 0 of units.
        replacement: the share of influence that comes from tokens, not from errors or units left out.
        completeness: the share of inputs that is not error or units left out, weighted by influence.
        error_share: the share of influence that ends in errors.
        others_share: the share of influence that ends in units left out.
        words: the tokens of the prompt.
        ids: the token ids of the prompt.
        target_words: the words of each target other than units, such as " Paris" or " Paris − Rome".
        layers: the number of layers of the model.
        vocabulary: the number of its tokens.
        leading: the number of leading positions whose units are no nodes.
    """

    influence: Float[Tensor, "node"]
    influence_null: Float[Tensor, "node sample"] | None
    excess: Float[Tensor, "node"] | None
    weight: Float[Tensor, "target node"]
    node_of: Int[Tensor, "target"]
    activation: Float[Tensor, "node"]
    value: Float[Tensor, "target"]
    residual: Float[Tensor, "target"]
    share: Float[Tensor, "target"]
    replacement: Float[Tensor, ""]
    completeness: Float[Tensor, ""]
    error_share: Float[Tensor, ""]
    others_share: Float[Tensor, ""]
    words: tuple[str, ...]
    ids: tuple[int, ...]
    target_words: tuple[str, ...]
    layers: int
    vocabulary: int
    leading: int

    @cached_property
    def nodes(self) -> list[Node]:
        """The nodes, in their order."""
        return [parse_node(name) for name in self.labels["node"]]

    @cached_property
    def kinds(self) -> dict[Kind, Tensor]:
        """A mask of the nodes of each kind."""
        return masks([kind_of(n) for n in self.nodes])

    @cached_property
    def level(self) -> Int[Tensor, "target"]:
        """The layer that each target reads; the number of layers of those that read the last stream."""
        layers = [layer_of(self.nodes[i]) for i in self.node_of.tolist()]
        return torch.tensor([self.layers if i is None else i for i in layers])

    @property
    def exceeds(self) -> Bool[Tensor, "node"] | None:
        """True at the targets, and at the nodes with an excess; None where chance alone exceeds the null too often."""
        if self.excess is None or self.influence_null is None or self.influence_null.shape[1] < _LEAST:
            return None
        return (self.excess > 0) | self.kinds["target"]

    def mask(self, names: Sequence[str]) -> Bool[Tensor, "node"]:
        """Return True at the nodes of these names.

        Raises:
            Refused: no such node.
        """
        found = torch.zeros(len(self.influence), dtype=torch.bool)
        found[torch.tensor(self._entries("node", list(names)), dtype=torch.long)] = True
        return found

    def edge(self, text: str) -> tuple[int, int]:
        """Return the row and the column of an edge, `source→target`.

        Raises:
            Refused: no such source or target.
        """
        edge = parse_edge(text)
        (row,), (column,) = self._entries("target", str(edge.target)), self._entries("node", str(edge.source))
        return row, column

    @cached_property
    def texts(self) -> dict[str, str]:
        """The words of the targets that are no units, by node."""
        return dict(zip(self.labels["target"][-len(self.target_words) :], self.target_words, strict=True))

    def scores(self, convention: str = "paper") -> tuple[float, float]:
        """Return replacement and completeness: as the paper defines them, or as `circuit-tracer` 0.5 counts."""
        if convention == "paper":
            return float(self.replacement), float(self.completeness)
        positions = torch.tensor([name.startswith("pos_embed") for name in self.labels["node"]])
        counted = (self.kinds["unit"] | self.kinds["error"] | self.kinds["token"]) & ~positions
        return circuit_tracer_scores(self.weight, self.node_of, self.level, self.share, self.kinds, counted)
