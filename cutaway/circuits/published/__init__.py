"""Published circuits as data: groups of components with the positions at which they act, and their connections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutaway.circuits.circuit import Circuit
from cutaway.circuits.components import belongs
from cutaway.core.address import Address
from cutaway.core.files import read_json
from cutaway.core.node import Edge, parse_node
from cutaway.core.refuse import Refused
from cutaway.models.edits.wiring import Wiring

_ELSEWHERE = "compare in the model of the paper"
_FOLDER = Path(__file__).parent
_MLPS = {"all": ("mlp_out.*",), "named": (), "none": ()}


@dataclass(frozen=True)
class Published:
    """A circuit of the literature.

    Attributes:
        name: its name here.
        model: the model that it was found in.
        paper: where it is described.
        read: where these lists were read.
        groups: the components of each group.
        positions: the position at which each group acts, in words.
        connections: pairs of groups, `embed` or `logits`, with the letters of the branches that read.
        mlps: all (they were never ablated), none (the model has none), or named among the groups.
    """

    name: str
    model: str
    paper: str
    read: str
    groups: dict[str, tuple[str, ...]]
    positions: dict[str, str]
    connections: tuple[tuple[str, str, str], ...]
    mlps: str

    @property
    def nodes(self) -> tuple[str, ...]:
        """The components of all groups."""
        return tuple(n for own in self.groups.values() for n in own)

    def components(self) -> Circuit:
        """Return all edges between its components; MLPs are in it unless it names its own."""
        return Circuit(self.name, nodes=(*self.nodes, *_MLPS[self.mlps]))

    def connected(self, wiring: Wiring) -> Circuit:
        """Return the edges between connected groups alone, as far as the wiring has them.

        Raises:
            Refused: a component that the model does not have.
        """
        rows, columns = ({a: i for i, a in enumerate(ends)} for ends in (wiring.writers, wiring.readers))
        of, edges = belongs(wiring), dict[Edge, None]()
        for source, target, letters in self.connections:
            for u in self._ends(source):
                for node in self._ends(target):
                    for v in _readers(node, letters, wiring, of, rows):
                        if u not in rows:
                            raise Refused(
                                f"component {u} of {self.name}", "this model has no such component", _ELSEWHERE
                            )
                        if wiring.heard[rows[u], columns[v]]:
                            edges[Edge(u, v)] = None
        return Circuit(f"{self.name}, connections", tuple(edges))

    def _ends(self, group: str) -> list[Address]:
        names = self.groups.get(group, (group,))
        return [a for n in names if isinstance(a := parse_node(n), Address)]


def _readers(node: Address, letters: str, wiring: Wiring, of: Any, rows: dict[Address, int]) -> list[Address]:
    if node == Address("logits"):
        return [node]
    if node not in rows:
        raise Refused(f"component {node}", "this model has no such component", _ELSEWHERE)
    own = [wiring.readers[i] for i in of[rows[node]].nonzero()[:, 0].tolist()]
    return [v for v in own if not letters or v.site[0] in letters]


def names() -> list[str]:
    """Return the names of the published circuits."""
    return sorted(p.stem for p in _FOLDER.glob("*.json"))


def published(name: str) -> Published:
    """Return a published circuit.

    Raises:
        Refused: none has that name.
    """
    if name not in names():
        raise Refused(f"published circuit {name!r}", "none has that name", f"use one of {', '.join(names())}")
    data = read_json(_FOLDER / f"{name}.json")
    groups = {g: tuple(own["nodes"]) for g, own in data["groups"].items()}
    positions = {g: own["position"] for g, own in data["groups"].items()}
    connections = tuple(tuple(c) for c in data["connections"])
    return Published(name, data["model"], data["paper"], data["read"], groups, positions, connections, data["mlps"])
