"""Messages of circuits on the screen of graphs: scores of edges, the circuit of the first of them, and the truth."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cutaway.studio.graph_messages import GraphNode
from cutaway.studio.messages import Message, Name, Request

Truth = Literal["identifiable", "structural"]


class CircuitCard(Message):
    """Scores of edges that can be opened: of which method, on which task."""

    id: str
    method: str
    task: str


class Circuits(Message):
    """The scores of edges of a model."""

    circuits: list[CircuitCard]


class CircuitOf(Request):
    """The first edges of a ranking by |score|, beside a truth where it is known: as many as that has if not said."""

    circuit: Name
    edges: Annotated[int, Field(ge=1, le=300)] | None = None
    truth: Truth = "identifiable"


class CircuitEdge(Message):
    """An edge of a circuit: its ends as they are drawn, its score with interval, control and exact score.

    `known` says if it is an edge of the truth: found (both have it), missed (only the truth), beyond (only the
    circuit); empty where no truth is known.
    """

    name: str
    source: int
    target: int
    weight: float
    interval: tuple[float, float] | None
    control: tuple[float, float] | None
    exact: float | None
    known: Literal["", "found", "missed", "beyond"]


class CircuitPage(Message):
    """A circuit as the page draws it.

    `truths` has the edges of each known truth, and `call` the values of a form that evaluates the ranking.
    """

    circuit: str
    method: str
    task: str
    unit: str
    depths: list[str]
    columns: list[str]
    starts: list[float]
    nodes: list[GraphNode]
    edges: list[CircuitEdge]
    inside: int
    all_edges: int
    truths: dict[Truth, list[str]]
    call: dict[str, Any]
    how: str
    python: str
    command: str
