"""Circuits in hand: edges with or without scores, or a list of components, to be evaluated on a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.circuits.components import belongs, components, heads_per_group
from cutaway.core.address import Address
from cutaway.core.node import Edge
from cutaway.core.record import hash_tensors, hash_text
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.repeat import Made
from cutaway.core.stats import generator
from cutaway.models.edits.wiring import Wiring


@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges of some wiring, by the names of their ends; with scores it is a ranking, of which each size is a circuit.

    Attributes:
        name: where it comes from.
        edges: the edges.
        score: a score of each; None of a mere set.
        nodes: components (`z.9.6`, `mlp_out.3`, `mlp_out.*`), of which all edges between them, from the embeddings and
            to the logits belong to the circuit too.
        per_head: True if keys and values are those of each head, as other tools have them: where heads share them in
            a model, scores of one group add up.
        made: the recipe that makes it again.
    """

    name: str
    edges: tuple[Edge, ...] = ()
    score: Float[Tensor, "edge"] | None = field(default=None, repr=False)
    nodes: tuple[str, ...] = ()
    per_head: bool = False
    made: Made | None = field(default=None, repr=False)

    def identity(self) -> dict[str, Any]:
        """Return what a record says of it."""
        named = hash_text("\n".join([*map(str, self.edges), *self.nodes]))
        scores = {} if self.score is None else {"scores": hash_tensors({"score": self.score})}
        return {"circuit": self.name, "edges": len(self.edges), "hash": named, **scores}

    def sizes(self) -> dict[str, int]:
        """Return no sizes: costs depend on those of the model."""
        return {}

    def scores(self, wiring: Wiring) -> Float[Tensor, "edge"]:
        """Return the score of every edge of a wiring: of a set 1 inside it, and NaN at all others.

        Raises:
            Refused: an edge or a component that the wiring does not have.
        """
        out = torch.full(wiring.heard.shape, torch.nan)
        if self.nodes:
            out[_between(wiring, self.nodes, self.name)] = 1.0
        if self.edges:
            at = self._at(wiring)
            values = torch.ones(len(at)) if self.score is None else self.score.float().cpu()
            out[at[:, 0], at[:, 1]] = 0.0
            out.index_put_((at[:, 0], at[:, 1]), values, accumulate=self.score is not None)
        u, v = wiring.pairs.T
        return out[u, v]

    def _at(self, wiring: Wiring) -> Int[Tensor, "edge 2"]:
        rows, columns = ({a: i for i, a in enumerate(ends)} for ends in (wiring.writers, wiring.readers))
        share = heads_per_group(wiring) if self.per_head else 1

        def column(v: object) -> int:
            if isinstance(v, Address) and v.site in ("k_in", "v_in") and v.unit is not None:
                v = replace(v, unit=v.unit // share)
            return columns.get(v, -1)  # type: ignore[call-overload]

        at = [(rows.get(e.source, -1), column(e.target)) for e in self.edges]  # type: ignore[call-overload]
        lost = [e for e, (u, v) in zip(self.edges, at, strict=True) if min(u, v) < 0 or not wiring.heard[u, v]]
        if lost:
            raise Refused(
                f"edge {lost[0]} of {self.name}", "this model has no such edge", "name edges as z.9.6→q_in.10.0"
            )
        return torch.tensor(at)

    def mask(self, wiring: Wiring) -> Bool[Tensor, "writer reader"]:
        """Return the mask that keeps its edges.

        Raises:
            Refused: it ranks all edges, or has one that the wiring does not have.
        """
        scores = self.scores(wiring)
        if self.ranked() and bool(scores.isfinite().all()):
            why = "it ranks all edges of the model, and a circuit is some of them"
            raise Refused(f"circuit {self.name}", why, ("take its first edges: ", Keyword("circuit_edges", "200")))
        return mask_of(wiring, scores.isfinite().nonzero()[:, 0])

    def first(self, n: int, signed: bool = False) -> Circuit:
        """Return its first n edges by |score|, or by score.

        Raises:
            Refused: it has no scores.
        """
        if self.score is None:
            raise Refused(f"first {n} edges of {self.name}", "they have no scores", "give the circuit as it is")
        order = (self.score if signed else self.score.abs()).argsort(descending=True, stable=True)[:n]
        name = f"first {n} edges of {self.name}" + (" by score" if signed else "")
        edges = tuple(self.edges[i] for i in order.tolist())
        return Circuit(name, edges, self.score[order], per_head=self.per_head)

    def ranked(self) -> bool:
        """Return True if its edges have scores that differ."""
        return self.score is not None and len(self.score.unique()) > 2


def first(wiring: Wiring, scores: Float[Tensor, "edge"], n: int, signed: bool = False) -> Bool[Tensor, "writer reader"]:
    """Return the mask of the first n edges by |score|, or by score; those without one come last."""
    size = (scores if signed else scores.abs()).nan_to_num(-torch.inf)
    return mask_of(wiring, size.argsort(descending=True, stable=True)[:n])


def mask_of(wiring: Wiring, edges: Int[Tensor, "chosen"]) -> Bool[Tensor, "writer reader"]:
    """Return the mask that keeps some edges of a wiring."""
    out = torch.zeros_like(wiring.heard)
    u, v = wiring.pairs[edges].T
    out[u, v] = True
    return out


def alike(wiring: Wiring) -> Int[Tensor, "edge"]:
    """Return the group of each edge: of all between the same two sites of the same two layers."""
    kinds = {kind: n for n, kind in enumerate(dict.fromkeys(a.place for a in (*wiring.writers, *wiring.readers)))}
    rows, columns = (torch.tensor([kinds[a.place] for a in ends]) for ends in (wiring.writers, wiring.readers))
    u, v = wiring.pairs.T
    return (rows[u] * len(kinds) + columns[v]).unique(return_inverse=True)[1]


def exchanged(wiring: Wiring, seed: int) -> Int[Tensor, "edge"]:
    """Draw a permutation of the edges that exchanges only those that are alike."""
    group = alike(wiring)
    own = group.argsort(stable=True)
    order = torch.randperm(len(group), generator=generator(seed))
    out = torch.empty_like(order)
    out[own] = order[group[order].argsort(stable=True)]
    return out


def matched(wiring: Wiring, mask: Bool[Tensor, "writer reader"], seed: int) -> Bool[Tensor, "writer reader"]:
    """Draw a circuit with as many edges as this one has between each two sites of each two layers."""
    u, v = wiring.pairs.T
    return mask_of(wiring, mask[u, v][exchanged(wiring, seed)].nonzero()[:, 0])


def without_dead_ends(wiring: Wiring, mask: Bool[Tensor, "writer reader"]) -> Bool[Tensor, "writer reader"]:
    """Return a circuit without the edges on no path from the embeddings to the logits."""
    mask, of = mask & wiring.heard, belongs(wiring)
    while True:
        fed = (of & mask.any(0)).any(1)  # writers with an edge into one of their readers
        fed[0] = True
        heard = (of & (mask.any(1) & fed)[:, None]).any(0)  # readers whose writer is heard by another
        heard[-1] = True
        left = mask & fed[:, None] & heard
        if torch.equal(left, mask):
            return mask
        mask = left


def _between(wiring: Wiring, nodes: Sequence[str], name: str) -> Bool[Tensor, "writer reader"]:
    """Return the edges between components, from the embeddings and to the logits."""
    known = components(wiring)
    chosen = {c for n in nodes for c in known if c == n or (n.endswith(".*") and c.startswith(n[:-1]))}
    lost = [n for n in nodes if not any(c == n or (n.endswith(".*") and c.startswith(n[:-1])) for c in known)]
    if lost:
        raise Refused(f"component {lost[0]} of {name}", "this model has no such component", "use z.9.6 or mlp_out.3")
    rows = torch.tensor([c in chosen or c == "embed" for c in known])
    columns = (belongs(wiring) & rows[:, None]).any(0)
    columns[-1] = True
    return wiring.heard & rows[:, None] & columns
