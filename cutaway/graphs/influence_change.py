"""Influences of two attribution graphs side by side: of nodes that both have, and of those that one has alone.

Nodes are the same if their names are. Where the prompts have unlike numbers of tokens positions mean nothing, and
nodes are added up over positions: influence is a sum over paths, so that the sum of some nodes is theirs together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cutaway.core.graph import Graph
from cutaway.core.node import parse_node
from cutaway.core.refuse import Refused
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.influence import kind_of

_SOURCES = ("unit", "error", "others", "token")  # of influence


@dataclass(frozen=True)
class InfluenceChange:
    """Influences of nodes in two graphs.

    Attributes:
        first: of each node of the first graph, by its name.
        second: of each node of the second graph.
        pooled: True if nodes were added up over positions.
    """

    first: dict[str, float]
    second: dict[str, float]
    pooled: bool

    @property
    def change(self) -> dict[str, float]:
        """The influence in the first graph less that in the second, 0 where a graph lacks the node; largest first."""
        names = dict.fromkeys([*self.first, *self.second])
        found = {n: self.first.get(n, 0.0) - self.second.get(n, 0.0) for n in names}
        return dict(sorted(found.items(), key=lambda row: -abs(row[1])))

    def alone(self) -> tuple[float, float]:
        """Return the share of each graph's influence that belongs to nodes that the other one lacks."""
        sides = ((self.first, self.second), (self.second, self.first))
        one, two = (
            sum(v for n, v in own.items() if n not in other) / max(sum(own.values()), 1e-30) for own, other in sides
        )
        return one, two


def influence_change(first: AttributionGraph | Graph, second: AttributionGraph | Graph) -> InfluenceChange:
    """Return the influences of the nodes of two graphs: of units, errors and tokens.

    Args:
        first: a traced graph, or a pruned one of a file.
        second: another.

    Raises:
        Refused: a file without influences.
    """
    pooled = _columns(first) != _columns(second)
    return InfluenceChange(_influences(first, pooled), _influences(second, pooled), pooled)


def _columns(of: AttributionGraph | Graph) -> int:
    """Return the number of positions that nodes may stand at."""
    if isinstance(of, AttributionGraph):
        return len(of.words)
    return 1 + max((n.position for n in of.nodes if n.position is not None), default=0)


def _influences(of: AttributionGraph | Graph, pooled: bool) -> dict[str, float]:
    if isinstance(of, Graph) and "influence" not in of.labels.get("attribute", []):
        raise Refused("influences of an imported graph", "the file has none", "trace the prompt here")
    values = of.influence if isinstance(of, AttributionGraph) else of.attribute("influence")
    found = Counter[str]()
    for name, value in zip(of.labels["node"], values.tolist(), strict=True):
        if kind_of(parse_node(name)) in _SOURCES:
            found[name.partition("@")[0] if pooled else name] += value
    return dict(found)
