"""Influence of nodes on an attribution graph's targets, and the scores of a graph that follow from it.

With Â the matrix of |edges|, each row divided by its sum, and p the targets' weights, a node's influence is the sum
over all paths from it, p · Σ_k Â^k (Ameisen et al. 2025). Edges lead from lower to higher layers, so that one pass
down the layers gives the whole sum. Constants (biases, MLPs at leading positions) are no part of Â.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.node import Bias, Direction, Error, Latent, Logit, Node, Others

ROWS = 512  # of a large matrix, those that are copied at once
_TINY = 1e-30
Kind = str


def kind_of(node: Node) -> Kind:
    """Return the kind of a graph's node: unit, error, others, token, constant or target."""
    match node:
        case Latent() | Address(site="mlp_post"):
            return "unit"
        case Error():
            return "error"
        case Others():
            return "others"
        case Logit() | Direction():
            return "target"
        case Bias() | Address(site="mlp_out"):
            return "constant"
    return "token"


def masks(kinds: Sequence[Kind]) -> dict[Kind, Bool[Tensor, "node"]]:
    """Return a mask of the nodes of each kind."""
    names = ("unit", "error", "others", "token", "constant", "target")
    return {name: torch.tensor([k == name for k in kinds], dtype=torch.bool) for name in names}


def sources(kinds: dict[Kind, Bool[Tensor, "node"]]) -> Bool[Tensor, "node"]:
    """Return the nodes that influence is counted from: all but constants and targets."""
    return ~(kinds["constant"] | kinds["target"])


def spread(
    weight: Float[Tensor, "target node"],
    at: Int[Tensor, "target"],
    level: Int[Tensor, "target"],
    start: Float[Tensor, "batch target"],
    counted: Bool[Tensor, "node"],
) -> Float[Tensor, "batch node"]:
    """Return the influence of every node.

    Args:
        weight: the edges, a row per target.
        at: the node that each target is; −1 for one outside the graph.
        level: the layer of each target: its sources lie below.
        start: the weights of the targets, for several questions at once.
        counted: the nodes that edges are counted from.
    """
    out = weight.new_zeros(len(start), weight.shape[1])
    for one in level.unique(sorted=True).flip(0).tolist():
        rows = (level == one).nonzero()[:, 0]
        edges = weight[rows].abs_().mul_(counted)
        mass = start[:, rows] + torch.where(at[rows] >= 0, out[:, at[rows].clamp_min(0)], 0.0)
        out += (mass / edges.sum(1).clamp_min(_TINY)) @ edges
    return out


def shares(
    weight: Float[Tensor, "target node"], counted: Bool[Tensor, "node"], of: Bool[Tensor, "node"]
) -> Float[Tensor, "target"]:
    """Return the share of some nodes in each target's |edges|; 0 for targets without edges."""
    both = torch.stack([of, counted], 1).to(weight)
    part, whole = torch.cat([rows.abs() @ both for rows in weight.split(ROWS)]).T
    return part / whole.clamp_min(_TINY)


def replacement(
    influence: Float[Tensor, "*batch node"], token: Bool[Tensor, "node"], unexplained: Bool[Tensor, "node"]
) -> Float[Tensor, "*batch"]:
    """Return the share of influence that ends in tokens, of that which ends in tokens or unexplained."""
    from_tokens, rest = influence[..., token].sum(-1), influence[..., unexplained].sum(-1)
    return from_tokens / (from_tokens + rest).clamp_min(_TINY)


def completeness(
    influence: Float[Tensor, "node"],
    weight: Float[Tensor, "target node"],
    at: Int[Tensor, "target"],
    start: Float[Tensor, "target"],
    counted: Bool[Tensor, "node"],
    unexplained: Bool[Tensor, "node"],
) -> Float[Tensor, ""]:
    """Return the share of targets' inputs that is explained, weighted by the targets' influence.

    Nodes without inputs (tokens, errors) are no targets: what circuit-tracer 0.5 counts them as is
    `circuit_tracer_scores`.
    """
    mass = influence[at] + start
    return (mass * (1 - shares(weight, counted, unexplained))).sum() / mass.sum().clamp_min(_TINY)


def edge_scores(
    influence: Float[Tensor, "node"],
    weight: Float[Tensor, "target node"],
    at: Int[Tensor, "target"],
    start: Float[Tensor, "target"],
) -> Float[Tensor, "target node"]:
    """Return the influence that passes each edge: its share of its target's |edges|, times the target's influence."""
    every = torch.ones_like(influence, dtype=torch.bool)
    return weight.abs() * target_scales(influence, weight, at, start, every)[:, None]


def target_scales(
    influence: Float[Tensor, "node"],
    weight: Float[Tensor, "target node"],
    at: Int[Tensor, "target"],
    start: Float[Tensor, "target"],
    counted: Bool[Tensor, "node"],
) -> Float[Tensor, "target"]:
    """Return the influence that passes one unit of each target's |edges| from the nodes counted."""
    sizes = torch.cat([(rows.abs() * counted).sum(1) for rows in weight.split(ROWS)])
    return (influence[at] + start) / sizes.clamp_min(_TINY)


class GraphScores(TypedDict):
    """Replacement, completeness, and the shares of influence that end in errors and in units left out."""

    replacement: Float[Tensor, ""]
    completeness: Float[Tensor, ""]
    error_share: Float[Tensor, ""]
    others_share: Float[Tensor, ""]


def graph_scores(
    influence: Float[Tensor, "node"],
    weight: Float[Tensor, "target node"],
    at: Int[Tensor, "target"],
    start: Float[Tensor, "target"],
    kinds: dict[Kind, Bool[Tensor, "node"]],
) -> GraphScores:
    """Return the scores of a graph, on the CPU."""
    unexplained = kinds["error"] | kinds["others"]
    ends = influence[~kinds["unit"]].sum().clamp_min(_TINY)
    return {
        "replacement": replacement(influence, kinds["token"], unexplained).cpu(),
        "completeness": completeness(influence, weight, at, start, sources(kinds), unexplained).cpu(),
        "error_share": (influence[kinds["error"]].sum() / ends).cpu(),
        "others_share": (influence[kinds["others"]].sum() / ends).cpu(),
    }


def circuit_tracer_scores(
    weight: Float[Tensor, "target node"],
    at: Int[Tensor, "target"],
    level: Int[Tensor, "target"],
    start: Float[Tensor, "target"],
    kinds: dict[Kind, Bool[Tensor, "node"]],
    counted: Bool[Tensor, "node"],
) -> tuple[float, float]:
    """Return the replacement and completeness scores as circuit-tracer 0.5 computes them, of the same edges.

    There, tokens and errors have inputs of which no share is error, and so count as complete. `counted` are the sources
    that are nodes there: units, errors and tokens, without position embeddings.
    """
    influence = spread(weight, at, level, start[None], counted)[0]
    mass = influence.clone()
    mass[at] += start
    explained = torch.ones_like(mass)
    explained[at] = 1 - shares(weight, counted, kinds["error"])
    whole = (mass * explained).sum() / mass.sum().clamp_min(_TINY)
    return float(replacement(influence, kinds["token"], kinds["error"])), float(whole)
