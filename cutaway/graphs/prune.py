"""Pruning of attribution graphs: the smallest sets of nodes, then of edges, that hold most of the influence.

Conventions differ between tools; each is a row of `PRESETS`. A node stays if it is among the smallest set whose
influences sum to the node threshold. Among these, an edge stays if it is among the smallest set whose scores,
Â_ts (influence_t + weight_t), sum to the edge threshold, influences counted again. Units without an edge in or out, and
errors without one out, go; the process repeats until none is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.graph import Graph, graph
from cutaway.core.node import Edge
from cutaway.core.refuse import Keyword, Refused
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.grouping import Supernodes
from cutaway.graphs.influence import Kind, completeness, replacement, sources, spread, target_scales
from cutaway.views.wording import visible

_TINY = 1e-30
_OF_THE_CALL = ("command", "python", "cost")  # of a record, what is true of the traced graph alone


@dataclass(frozen=True)
class Preset:
    """A convention of pruning.

    Attributes:
        nodes: the share of influence that nodes hold.
        edges: the share of scores that edges hold.
        kept: the kinds of nodes that always stay.
        leading: the leading positions that the tool leaves out, for `trace(leading=…)`.
        source: where the convention is from.
    """

    nodes: float
    edges: float
    kept: tuple[Kind, ...]
    leading: int
    source: str


PRESETS: dict[str, Preset] = {
    "circuit-tracer": Preset(0.8, 0.98, ("token", "target"), 1, "circuit-tracer 0.5: errors are pruned like features"),
    "paper": Preset(0.8, 0.98, ("token", "error", "target"), 1, "Ameisen et al. 2025: embeddings and errors stay"),
    "neuronpedia": Preset(0.8, 0.85, ("token", "target"), 1, "defaults of Neuronpedia's generation"),
    "llamascopium": Preset(0.6, 0.8, ("token", "target"), 0, "llamascopium's complete replacement model"),
    "arena": Preset(0.8, 0.85, ("target",), 4, "ARENA 1.4.2: logits alone stay"),
}


def prune(
    whole: AttributionGraph,
    preset: str = "circuit-tracer",
    *,
    nodes: float | None = None,
    edges: float | None = None,
    pinned: tuple[str, ...] = (),
    supernodes: Supernodes | None = None,
    labels: Mapping[str, str] | None = None,
) -> Graph:
    """Return the part of a graph that holds most of the influence, with numbers of its nodes as attributes.

    `influence`, `cumulative` (with all nodes of a larger one), `activation`, the target's `share`, and `excess` if the
    graph has a control; `exceeds` is True at nodes with one.

    Args:
        whole: the traced graph.
        preset: a row of `PRESETS`.
        nodes: the share of influence that nodes hold, in place of the preset's.
        edges: the share of scores that edges hold, in place of the preset's.
        pinned: nodes that stay whatever their influence.
        supernodes: groups of units, which stay too, and which pictures show together.
        labels: what pictures show in place of nodes' names, such as those of `store_labels`.

    Raises:
        Refused: no such preset or node, a pinned constant, a share outside 0 to 1, or supernodes of another graph.
    """
    row, grouped = _row(preset, nodes, edges), Supernodes({}) if supernodes is None else supernodes
    grouped.check(whole)
    staying = _staying(whole, row, (*pinned, *(n for group in grouped.groups.values() for n in group)))
    kept, target, source = _pruned(whole, covering(whole.influence, row.nodes) | staying, row.edges, staying)
    pairs = zip(source.tolist(), whole.node_of[target].tolist(), strict=True)
    ends = [Edge(whole.nodes[s], whole.nodes[t]) for s, t in pairs]
    chosen = kept.nonzero()[:, 0].tolist()
    names = [whole.labels["node"][i] for i in chosen]
    made = graph(
        ends,
        whole.weight[target, source],
        nodes=names,
        attributes={name: values[chosen] for name, values in node_numbers(whole).items()},
        exceeds=None if whole.exceeds is None else whole.exceeds[chosen],
        groups=grouped.of_nodes(names) if grouped.groups else (),
        titles=[f"“{visible(whole.texts[n])}”" if n in whole.texts else (labels or {}).get(n, "") for n in names],
        words=whole.words,
        unit="of its value",
    )
    scores = dict(zip(("replacement", "completeness"), _scores(whole, kept), strict=True))
    pruning = {"preset": preset, "nodes": row.nodes, "edges": row.edges, "kept": list(row.kept), "pinned": list(pinned)}
    traced = {name: value for name, value in whole.record.items() if name not in _OF_THE_CALL}
    reasons = {"weight": "one prompt"}
    return replace(made, reasons=reasons, record=traced | {"pruning": pruning, "scores": scores})


def node_numbers(whole: AttributionGraph) -> dict[str, Float[Tensor, "node"]]:
    """Return the numbers of nodes that a pruned graph keeps: influences, their running shares, and activations."""
    influence = whole.influence
    order = influence.argsort(descending=True, stable=True)
    cumulative, share = torch.empty_like(influence), torch.zeros_like(influence)
    cumulative[order] = influence[order].cumsum(0) / influence.sum().clamp_min(_TINY)
    share[whole.node_of] = whole.share
    found = {"influence": influence, "cumulative": cumulative, "activation": whole.activation, "share": share}
    return found | ({} if whole.excess is None else {"excess": whole.excess})


def covering(values: Float[Tensor, "*any"], share: float) -> Bool[Tensor, "*any"]:
    """Return a mask of the smallest set of entries whose sum is this share of the whole, entries of 0 left out."""
    flat = values.reshape(-1)
    some = (flat > 0).nonzero()[:, 0]
    sizes, order = flat[some].sort(descending=True, stable=True)
    total = sizes.double().cumsum(0)
    n = int((total < share * total[-1]).sum()) + 1 if len(total) else 0
    found = torch.zeros_like(flat, dtype=torch.bool)
    found[some[order[:n]]] = True
    return found.view_as(values)


def _row(preset: str, nodes: float | None, edges: float | None) -> Preset:
    if preset not in PRESETS:
        raise Refused(Keyword("preset", preset), "there is no such preset", f"choose one of {', '.join(PRESETS)}")
    row = PRESETS[preset]
    row = replace(row, nodes=row.nodes if nodes is None else nodes, edges=row.edges if edges is None else edges)
    for name in ("nodes", "edges"):
        if not 0 <= getattr(row, name) <= 1:
            raise Refused(Keyword(name, getattr(row, name)), "it is a share", "give a number from 0 to 1")
    return row


def _staying(whole: AttributionGraph, row: Preset, pinned: tuple[str, ...]) -> Bool[Tensor, "node"]:
    """Return the nodes that stay whatever their influence and edges."""
    found = whole.mask(pinned)
    if bool((found & whole.kinds["constant"]).any()):
        raise Refused(Keyword("pinned", list(pinned)), "constants have no influence", "pin units, errors or tokens")
    for kind in row.kept:
        found |= whole.kinds[kind]
    return found


def _pruned(
    whole: AttributionGraph, kept: Bool[Tensor, "node"], edges: float, staying: Bool[Tensor, "node"]
) -> tuple[Bool[Tensor, "node"], Int[Tensor, "edge"], Int[Tensor, "edge"]]:
    """Return the nodes that stay, and the row and the column of each edge that stays.

    The matrix of all edges is large: of those between nodes that stay at first, [row column], a part is taken out.
    """
    at, unit = whole.node_of, whole.kinds["unit"]
    rows, columns = kept[at].nonzero()[:, 0], kept.nonzero()[:, 0]
    influence = spread(whole.weight, at, whole.level, whole.share[None], sources(whole.kinds) & kept)[0]
    scale = target_scales(influence, whole.weight, at, whole.share, kept)[rows, None]
    stays = covering(whole.weight[rows[:, None], columns].abs() * scale, edges)
    while True:
        alive, outgoing, incoming = kept.clone(), torch.zeros_like(kept), torch.zeros_like(kept)
        outgoing[columns], incoming[at[rows]] = stays.any(0), stays.any(1)
        alive &= staying | outgoing
        alive &= staying | incoming | ~unit
        stays &= alive[columns] & alive[at[rows], None]
        if torch.equal(alive, kept):
            row, column = stays.nonzero(as_tuple=True)
            return kept, rows[row], columns[column]
        kept = alive


def _scores(whole: AttributionGraph, kept: Bool[Tensor, "node"]) -> tuple[float, float]:
    """Return replacement and completeness of the nodes that stay, all edges between them."""
    at, counted = whole.node_of, sources(whole.kinds) & kept
    unexplained = (whole.kinds["error"] | whole.kinds["others"]) & kept
    influence = spread(whole.weight, at, whole.level, whole.share[None], counted)[0]
    found = completeness(influence, whole.weight, at, whole.share, counted, unexplained)
    return float(replacement(influence, whole.kinds["token"], unexplained)), float(found)
