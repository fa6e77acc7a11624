"""Graphs: results whose entries are edges between nodes, with the nodes' places in a layer × position layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address, parse
from cutaway.core.node import Bias, Direction, Edge, Latent, Logit, Node, Others, parse_edge, parse_node
from cutaway.core.node import Error as ErrorNode
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.sites import SITES

# The stages of a layer from bottom to top: the last site of each, and its name in a layout.
_STAGES = (("v", "attention in"), ("attn_out", "attention"), ("mlp_in", "MLP in"), ("mlp_out", "MLP"),
           ("ssm.in", "state space in"), ("ssm.out", "state space"), ("resid_post", "stream"))  # fmt: skip
_ORDER = {row.name: n for n, row in enumerate(SITES)}
_TOP = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Graph(Result, kind="graph"):
    """Weighted edges between nodes of a model: addresses, latents, errors and logits.

    Make one with `graph(edges, weight)`. `top`, `frame` and `select(edge=…)` speak of edges as `z.9.6→q_in.10.0`;
    `select(node=[…])` is the subgraph of those nodes.

    Attributes:
        weight: The weight of each edge.
        source: The node that each edge leaves.
        target: The node that each edge enters.
        depth: The layout's row of each node, counted from the input; `labels["depth"]` has its words.
        column: The layout's column of each node (its position); `labels["column"]` has its words.
        interval: The bounds of each weight, if known.
        null: Weights of a control, if there is one.
        attributes: Numbers of the nodes (activation, influence …), named by `labels["attribute"]`.
        exceeds: True at the nodes that exceed their control, if they have one.
        titles: Words of each node that pictures show in place of its name, "" for the name; empty without any.
        groups: The group that pictures show each node in, "" for none; empty without any.
    """

    weight: Float[Tensor, "edge"]
    source: Int[Tensor, "edge"]
    target: Int[Tensor, "edge"]
    depth: Int[Tensor, "node"]
    column: Int[Tensor, "node"]
    interval: Float[Tensor, "edge bound"] | None = None
    null: Float[Tensor, "edge sample"] | None = None
    attributes: Float[Tensor, "attribute node"] | None = None
    exceeds: Bool[Tensor, "node"] | None = None
    titles: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.labels.get("node")
        if names is None or len(set(names)) != len(names):
            raise ValueError("a graph needs a label for each node, no two alike")
        for each in (self.titles, self.groups):
            if each and len(each) != len(names):
                raise ValueError(f"{len(each)} titles or groups for {len(names)} nodes")
        for ends in (self.source, self.target):
            if ends.numel() and not 0 <= int(ends.min()) <= int(ends.max()) < len(names):
                raise ValueError(f"an edge ends at a node that is not among the {len(names)} of the graph")

    @property
    def nodes(self) -> list[Node]:
        """The nodes, in their order."""
        return [parse_node(name) for name in self.labels["node"]]

    @property
    def edges(self) -> list[Edge]:
        """The edges, in their order."""
        nodes = self.nodes
        return [Edge(nodes[s], nodes[t]) for s, t in zip(self.source.tolist(), self.target.tolist(), strict=True)]

    def edge_names(self) -> list[str]:
        """Return the string form of each edge."""
        names = self.labels["node"]
        return [f"{names[s]}→{names[t]}" for s, t in zip(self.source.tolist(), self.target.tolist(), strict=True)]

    def attribute(self, name: str) -> Float[Tensor, "node"]:
        """Return one attribute of the nodes.

        Raises:
            Refused: no such attribute.
        """
        known = self.labels.get("attribute", [])
        if self.attributes is None or name not in known:
            raise Refused(f"attribute {name!r}", "this graph does not have it", f"use one of {known}")
        return self.attributes[known.index(name)]

    def top(self, n: int = 10, by: str | None = None, largest: bool | None = None) -> list[dict[str, Any]]:
        """Return the `n` edges of largest |weight| (or entries of another field), with their nodes by name."""
        rows, names = super().top(n, by, largest), self.labels["node"]
        for row in rows:
            if "edge" in row and "source" in row:
                row |= {"source": names[row["source"]], "target": names[row["target"]]}
                row["edge"] = f"{row['source']}→{row['target']}"
        return rows

    def frame(self, name: str | None = None) -> Any:
        """Return one field as a long DataFrame; fields of edges have the columns `edge`, `source` and `target`."""
        table = super().frame(name)
        if "edge" in table.columns:
            names, at = self.labels["node"], table["edge"].tolist()
            ends = [[names[i] for i in t[at].tolist()] for t in (self.source.cpu(), self.target.cpu())]
            table["edge"] = [f"{s}→{t}" for s, t in zip(*ends, strict=True)]
            for column, values in zip(("source", "target"), ends, strict=True):
                if column not in table.columns:
                    table.insert(table.columns.get_loc("edge") + 1 + (column == "target"), column, values)
        return table

    def select(self, **at: Any) -> Self:
        """Return the graph restricted along axes; with `node`, to these nodes and the edges between them."""
        kept: Self = self
        if "edge" in at:
            kept = super(Graph, kept).select(edge=self._edges(at.pop("edge")))
        if "node" in at:
            kept = kept._between(at.pop("node"))
        return super(Graph, kept).select(**at) if at else kept

    def _edges(self, wanted: Any) -> list[int]:
        items = list(wanted) if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]
        known: dict[str, int] = {}
        for i, name in enumerate(self.edge_names()):
            known.setdefault(name, i)
        found: list[int] = []
        for item in items:
            at = item if isinstance(item, int) else known.get(str(parse_edge(item)))
            if at is None:
                raise Refused(f"edge {str(item)!r}", "this graph does not have it", "see edge_names()")
            found.append(at)
        return found

    def _between(self, wanted: Any) -> Self:
        items = list(wanted) if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]
        chosen = [self._index("node", len(self.depth), i if isinstance(i, int) else str(i)) for i in items]
        moved = torch.full((len(self.depth),), -1, device=self.source.device)
        moved[chosen] = torch.arange(len(chosen), device=moved.device)
        source, target = moved[self.source], moved[self.target]
        inside = ((source >= 0) & (target >= 0)).nonzero()[:, 0]
        between = super().select(edge=inside.tolist())
        between = replace(between, source=source[inside], target=target[inside], titles=(), groups=())
        titles, groups = (tuple(x[i] for i in chosen) if x else () for x in (self.titles, self.groups))
        return replace(super(Graph, between).select(node=chosen), titles=titles, groups=groups)


def graph(
    edges: Sequence[Edge | str],
    weight: Float[Tensor, "edge"],
    *,
    interval: Float[Tensor, "edge bound"] | None = None,
    null: Float[Tensor, "edge sample"] | None = None,
    nodes: Sequence[Node | str] = (),
    attributes: dict[str, Float[Tensor, "node"]] | None = None,
    exceeds: Bool[Tensor, "node"] | None = None,
    titles: Sequence[str] = (),
    groups: Sequence[str] = (),
    words: Sequence[str] = (),
    blocks: Sequence[str] = (),
    unit: str = "",
) -> Graph:
    """Make a graph of edges and their weights; it lays out its nodes by layer and position.

    Args:
        edges: the edges, in the order of `weight`.
        weight: the weight of each edge.
        interval: the bounds of each weight.
        null: weights of a control.
        nodes: the order of the nodes; nodes of edges that are not named here follow in order of appearance.
        attributes: numbers of the nodes by name, in the order of the graph's nodes.
        exceeds: True at the nodes that exceed their control.
        titles: words of the nodes that pictures show in place of their names.
        groups: the group that pictures show each node in, "" for none.
        words: the token at each position, which names the columns of the layout.
        blocks: the site that each block of a dictionary writes, by its number; without them a block's number is the
            layer of its MLP.
        unit: the unit of the weights.
    """
    ends = [parse_edge(e) for e in edges]
    order = list(dict.fromkeys([*map(parse_node, nodes), *(n for e in ends for n in (e.source, e.target))]))
    at = {node: i for i, node in enumerate(order)}
    depth, depth_words = _ranked([_stage(_standing(n, blocks)) for n in order])
    column, column_words = _ranked([_place(n, words) for n in order])
    table = torch.stack(list(attributes.values())) if attributes else None
    found = {"node": [str(n) for n in order], "depth": depth_words, "column": column_words}
    found |= {"attribute": list(attributes)} if attributes else {}
    return Graph(
        weight=weight,
        source=torch.tensor([at[e.source] for e in ends], dtype=torch.long),
        target=torch.tensor([at[e.target] for e in ends], dtype=torch.long),
        depth=depth,
        column=column,
        interval=interval,
        null=null,
        attributes=table,
        exceeds=exceeds,
        titles=tuple(titles),
        groups=tuple(groups),
        labels=found,
        units={"weight": unit, "interval": unit, "null": unit} if unit else {},
    )


def _ranked(keys: list[tuple[Any, str]]) -> tuple[Int[Tensor, "node"], list[str]]:
    """Return the dense rank of each key among all, and each key's words."""
    rank = {k: i for i, k in enumerate(sorted({k for k, _ in keys}))}
    return torch.tensor([rank[k] for k, _ in keys], dtype=torch.long), [word for _, word in keys]


def _standing(node: Node, blocks: Sequence[str]) -> Node:
    """Return the site of a block's latents and error where it is known, else the node itself."""
    return parse(blocks[node.block]) if blocks and isinstance(node, Latent | ErrorNode) else node


def _stage(node: Node) -> tuple[tuple[int, int], str]:
    """Return the row of a node, which sorts from the input to the logits, and its words."""
    match node:
        case Latent(block=layer) | ErrorNode(block=layer) | Others(block=layer):
            return (layer, 3), f"{layer} MLP"
        case Logit() | Direction():
            return (_TOP, 2), "logits"
        case Bias(site="", layer=None):
            return (-1, 0), "embedding"
        case Bias(site=site, layer=layer):
            return _stage(Address(site, layer))
        case Address(site="embed" | "pos_embed"):
            return (-1, 0), "embedding"
        case Address(site=site, layer=None):
            return (_TOP, 2 if site == "logits" else 1), "logits" if site == "logits" else "final norm"
        case Address(site="ln1.scale", layer=int(layer)):
            return (layer, 0), f"{layer} attention in"
        case Address(site="ln2.scale", layer=int(layer)):
            return (layer, 2), f"{layer} MLP in"
        case Address(site=site, layer=int(layer)):
            stage = next(n for n, (last, _) in enumerate(_STAGES) if _ORDER[site] <= _ORDER[last])
            return (layer, stage), f"{layer} {_STAGES[stage][1]}"
    raise AssertionError("unreachable")


def _place(node: Node, words: Sequence[str]) -> tuple[tuple[int, int], str]:
    """Return the column of a node, which sorts by position, and its words; negative positions count from the end."""
    position = node.position
    if position is None:
        return (2, 0), "any position"
    if words:
        position = position % len(words) if -len(words) <= position < len(words) else position
        return (0, position), words[position] if 0 <= position < len(words) else str(position)
    return (1 if position < 0 else 0, position), str(position)
