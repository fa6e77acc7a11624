"""Vectors that nodes of a graph write, and what becomes of them on the way up the stream, patterns and divisors frozen.

The sweep takes readers down the layers; here what is written goes up, through the same linear maps untransposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.node import Error, Latent, Node
from cutaway.core.refuse import Refused
from cutaway.graphs.trace import Run

Steps = list[tuple[Address, Float[Tensor, "d_model"]]]


def writes(run: Run, node: Node) -> Steps:
    """Return what a unit, an error or a token writes: a vector at each place.

    Raises:
        Refused: a node of another kind.
    """
    match node:
        case Address(site="embed" | "pos_embed", position=int(p)):
            return [(node, run.frozen.embeddings[node.site][p])]
        case Error(block=i, position=int(p)):
            return [(Address("mlp_out", i, position=p), run.units.written[i].error[p])]
        case Latent() | Address(site="mlp_post"):
            return _unit_writes(run, unit_at(run, node))
    raise Refused(f"node {node}", "it is no unit, error or token that writes at one position", "choose such a node")


def unit_at(run: Run, node: Latent | Address) -> int:
    """Return the number of a unit in the table of its run."""
    t = run.units.table
    layer, number = (node.layer, node.unit) if isinstance(node, Address) else (node.block, node.index)
    return int(((t.layer == layer) & (t.index == number) & (t.position == node.position)).nonzero()[0])


def _unit_writes(run: Run, at: int) -> Steps:
    t, out = run.units.table, list[tuple[Address, Tensor]]()
    position = int(t.position[at])
    starts = t.starts(run.frozen.layers, run.frozen.width)[position].tolist()
    for i, w in enumerate(run.units.written):
        if starts[w.first] <= at < starts[w.last + 1]:
            vector = w.vectors[position][at - starts[w.first]]
            out += [(Address("mlp_out", i, position=position), vector)] if bool(vector.any()) else []
    return out


def random_writes(steps: Steps, g: torch.Generator) -> Steps:
    """Return random vectors as long as those written, at the same places."""
    drawn = [(place, torch.randn(len(v), generator=g).to(v)) for place, v in steps]
    return [(p, x / x.norm() * v.norm()) for (p, x), (_, v) in zip(drawn, steps, strict=True)]


@torch.no_grad()
def ascend(run: Run, sources: Sequence[Steps]) -> Iterator[Float[Tensor, "source position d_model"]]:
    """Yield the part of the stream that each source makes up: before each layer, and behind the last one."""
    f, x = run.frozen, _placed(run, sources, "embed", None) + _placed(run, sources, "pos_embed", None)
    inside = (torch.arange(f.width, device=x.device) >= run.units.leading)[:, None]
    skipped = dict[int, Tensor]()
    for i in range(f.layers):
        yield x
        after = x + f.attention_of(i, x)
        for skip in run.units.skips:
            if skip.read == i:
                read = f.mlp_reads(i, x if f.anatomy.parallel else after)
                skipped[skip.written] = skipped.get(skip.written, 0.0) + (read @ skip.matrix.T) * inside
        x = after + _placed(run, sources, "mlp_out", i) + skipped.pop(i, 0.0)
    yield x


def _placed(
    run: Run, sources: Sequence[Steps], site: str, layer: int | None
) -> Float[Tensor, "source position d_model"]:
    """Return what the sources write at one site."""
    out = torch.zeros(len(sources), run.frozen.width, run.frozen.model.shape.d_model).to(run.targets.vector)
    for row, steps in enumerate(sources):
        for place, vector in steps:
            if (place.site, place.layer) == (site, layer):
                out[row, place.position] += vector
    return out
