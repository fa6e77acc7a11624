"""Messages of the screen of graphs: a traced graph pruned and drawn, its nodes, its groups, and files of others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cutaway.studio.feature_messages import LatentOf
from cutaway.studio.messages import Message, Name, Request

Share = Annotated[float, Field(ge=0, le=1)]
Groups = Annotated[dict[Name, Annotated[list[Name], Field(max_length=500)]], Field(max_length=100)]


class GraphCard(Message):
    """A graph that can be opened."""

    id: str
    name: str
    prompt: str


class Graphs(Message):
    """The graphs of the studio, the units that can be traced, and the conventions of pruning."""

    graphs: list[GraphCard]
    transcoders: list[str]
    presets: dict[str, tuple[float, float]]


class GraphNamed(Request):
    """A graph: the id of a result, or `file:ID`."""

    graph: Name


class GraphOf(GraphNamed):
    """A graph, how it is pruned, and which of its units a reader takes for one thing."""

    preset: Name = "circuit-tracer"
    nodes: Share | None = None
    edges: Share | None = None
    pinned: tuple[Name, ...] = Field((), max_length=200)
    supernodes: Groups = Field(default_factory=dict)


class GraphNode(Message):
    """A node of the picture: its place, its words, and its numbers."""

    name: str
    kind: str
    title: str
    depth: int
    column: int
    slot: float
    group: str
    weak: bool
    influence: float | None
    cumulative: float
    activation: float
    share: float


class GraphEdge(Message):
    """An edge between two nodes of the picture, by their places in the list."""

    source: int
    target: int
    weight: float


class Scores(Message):
    """The scores of a graph: the shares of influence that it explains."""

    replacement: float
    completeness: float
    error_share: float | None = None
    others_share: float | None = None


class GraphPage(Message):
    """A pruned graph as the page draws it; `hidden` is the number of its smallest edges that are left out."""

    graph: str
    prompt: str
    targets: list[str]
    depths: list[str]
    columns: list[str]
    starts: list[float]
    nodes: list[GraphNode]
    edges: list[GraphEdge]
    hidden: int
    whole: Scores | None
    drawn: Scores | None
    all_nodes: int | None
    all_edges: int | None
    preset: str
    node_share: float | None
    edge_share: float | None
    call: dict[str, Any] | None
    how: str
    python: str
    command: str


class NodeOf(GraphNamed):
    """A node of a graph."""

    node: Name


class GraphLink(Message):
    """An edge to or from a node: the other end with its words, its weight, and its share of what its target reads."""

    node: str
    title: str
    weight: float
    share: float


class NodePage(Message):
    """A node with the largest edges into it and out of it, in the whole graph; `page` is its latent in a store."""

    node: str
    title: str
    influence: float
    null: float | None
    activation: float
    value: float | None
    inputs: list[GraphLink]
    outputs: list[GraphLink]
    page: LatentOf | None


class TwoGraphs(GraphNamed):
    """A graph and another one."""

    other: Name
    most: Annotated[int, Field(ge=1, le=1000)] = 200


class NodeChange(Message):
    """A node in two graphs: its words, and its influence in each; None in the one that does not have it."""

    node: str
    title: str
    first: float | None
    second: float | None
    change: float


class GraphChange(Message):
    """Influences in a graph minus those in another, the largest first; `pooled` if positions were added up.

    `first_only` and `second_only` are the shares of each graph's influence of nodes that the other does not have.
    """

    rows: list[NodeChange]
    nodes: int
    common: int
    first_only: float
    second_only: float
    pooled: str


class GroupsOf(GraphNamed):
    """Groups of a graph's units that are kept in a file."""

    supernodes: Groups


class Kept(Message):
    """The id of a file that was kept."""

    id: str


class ForeignGraph(Request):
    """A graph file of circuit-tracer or Neuronpedia."""

    name: Name = "graph"
    data: dict[str, Any]


class GraphFile(Message):
    """A graph file of the schema of circuit-tracer and Neuronpedia."""

    data: dict[str, Any]
    format: Literal["neuronpedia"] = "neuronpedia"
