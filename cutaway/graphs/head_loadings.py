"""Which attention heads carry an edge of an attribution graph?

An edge A = vᵀ J w sums all paths from what a source writes (w) to what a target reads (v); with attention patterns
frozen, every path that changes position passes OV circuits. Head loadings are the split that circuit-tracer's users
ask for (decoderesearch/circuit-tracer, issue 53; Kamath et al. 2025, transformer-circuits.pub/2025/attention-qk).

* Definition: each path counts for its last attention head before the target. With x the part of the stream before
  layer i that the source makes up (over all paths), and g the target's reader along paths without attention,
  `loading[edge, i, h]` = g · (pattern_h x W_V^h W_O^h) at the target's position, norms' divisors frozen. `bypass` are
  the paths without attention: the stream, and skips of transcoders.
* Closure: Σ heads + bypass = the edge, a refusal beyond rounding. The two sides are computed apart: edges by readers
  that go down the layers, loadings by what is written, going up.
* Control (`loading_null`): the same heads with as long a random vector written in the source's place. A head that
  carries it as well is not evidence about this source.
* Known failures: earlier heads of a path of several are not counted, and a loading says where, not why, a head looks
  (`graphs.qk`). No interval: it is one prompt, the first of several.
* Equivalences (tests): what hooks by hand measure in the frozen model; one layer apart, pattern · v W_V W_O by the
  weights.
* Cost: that of `graphs.trace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.node import Direction, Latent, Logit
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import generator
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.influence import edge_scores
from cutaway.graphs.subject import Neurons
from cutaway.graphs.sweep import Readers
from cutaway.graphs.trace import Run, prepare
from cutaway.graphs.writes import Steps, ascend, random_writes, unit_at, writes
from cutaway.lenses.closure import check_closure
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class HeadLoadings(Result, kind="head_loadings"):
    """Parts of edges that attention heads carry.

    Attributes:
        loading: the part of each edge whose paths pass each head last.
        loading_null: the same of random vectors in the sources' place.
        bypass: the part whose paths pass no head.
        weight: the edges.
        residual: what `loading` and `bypass` miss of them.
    """

    loading: Float[Tensor, "edge layer head"]
    loading_null: Float[Tensor, "edge layer head sample"]
    bypass: Float[Tensor, "edge"]
    weight: Float[Tensor, "edge"]
    residual: Float[Tensor, "edge"]


@method(
    answers="Which attention heads carry an edge of an attribution graph?",
    paper="Kamath et al. 2025, transformer-circuits.pub/2025/attention-qk",
    cost="3 * F",
    control="random_vector",
    rung="observational",
)
def head_loadings(
    model: Model,
    task: Task | Prompts,
    transcoders: Dictionary | Neurons,
    /,
    *,
    edges: tuple[str, ...] = (),
    top: int = 20,
    targets: tuple[str, ...] = (),
    nodes: int = 7500,
    leading: int | None = None,
    samples: int = 10,
    seed: int = 0,
) -> HeadLoadings:
    """Split edges of a prompt's attribution graph into the parts that each attention head carries.

    Args:
        edges: edges of the graph, for example `latent.1.204@3→logit.17@5` [default: those of the most influence between
            two positions].
        top: how many edges, where none is named.
        targets: as in `trace`.
        nodes: most units that are nodes of the graph.
        leading: leading positions whose units are no nodes, as in `trace`.
        samples: how many random vectors make the null of each edge.
        seed: of the random vectors.

    Raises:
        Refused: what `trace` refuses, no such edge, or loadings that do not sum to their edges.
    """
    run = prepare(model, task, transcoders, targets, logits=10, mass=0.95, leading=leading, samples=2, seed=seed)
    whole = run.graph(nodes)
    rows, columns = _chosen(whole, edges, top)
    sources = [writes(run, whole.nodes[i]) for i in columns.tolist()]
    readers = _readers(run, whole, rows)
    direct = descend(run, readers)
    g = generator(seed)
    loading = _loadings(run, sources, readers, direct)
    null = [_loadings(run, [random_writes(s, g) for s in sources], readers, direct) for _ in range(samples)]
    bypass, weight = _bypass(sources, readers, direct), whole.weight[rows, columns]
    residual = weight - loading.sum((1, 2)) - bypass
    sizes = loading.abs().sum((1, 2)) + bypass.abs()
    check_closure("head loadings of edges", model, residual, weight, sizes)
    names = [f"{whole.labels['node'][c]}→{whole.labels['target'][r]}" for r, c in zip(rows, columns, strict=True)]
    return HeadLoadings(
        loading=loading,
        loading_null=torch.stack(null, -1) if null else loading[..., None][..., :0],
        bypass=bypass,
        weight=weight,
        residual=residual,
        labels={"edge": names},
        units=dict.fromkeys(("loading", "loading_null", "bypass", "weight"), "of its value"),
        reasons={"loading": "one prompt"},
        record=whole.record | {"loading": "by the last attention head of each path"},
    )


def _chosen(whole: AttributionGraph, edges: Sequence[str], top: int) -> tuple[Int[Tensor, "edge"], Int[Tensor, "edge"]]:
    """Return the rows and columns of the edges that are named, or of those of the most influence between positions."""
    if edges:
        pairs = torch.tensor([whole.edge(e) for e in edges])
        return pairs[:, 0], pairs[:, 1]
    at = torch.tensor([-1 if getattr(n, "position", None) is None else n.position for n in whole.nodes])
    apart = (at >= 0) & (at < at[whole.node_of, None]) & ~(whole.kinds["constant"] | whole.kinds["others"])
    scores = edge_scores(whole.influence, whole.weight, whole.node_of, whole.share) * apart
    n = min(top, int((scores > 0).sum()))
    if n < 1:
        what = (Keyword("top", top), " edges between positions")
        raise Refused(what, "the graph has none with an influence", ("name ", Keyword("edges")))
    best = scores.flatten().topk(n).indices
    return best // scores.shape[1], best % scores.shape[1]


def _readers(run: Run, whole: AttributionGraph, rows: Int[Tensor, "edge"]) -> Readers:
    """Return the readers of the edges' targets."""
    device, ends = run.targets.vector.device, [str(n) for n in run.targets.nodes]
    layer, position, vector = list[int](), list[int](), list[Tensor]()
    for node in (whole.nodes[i] for i in whole.node_of[rows].tolist()):
        if isinstance(node, Logit | Direction):
            layer.append(run.frozen.layers)
            position.append(run.frozen.width - 1)
            vector.append(run.targets.vector[ends.index(str(node))])
            continue
        assert isinstance(node, Latent | Address)
        at = torch.tensor([unit_at(run, node)], device=device)
        layer.append(int(run.units.table.layer[at]))
        position.append(int(run.units.table.position[at]))
        vector.append(run.units.readers(at)[0])
    return Readers(torch.tensor(layer, device=device), torch.tensor(position, device=device), torch.stack(vector))


@dataclass(frozen=True, eq=False)
class Direct:
    """Vectors with which targets read what each layer writes, along paths without attention.

    Attributes:
        attention: of what attention writes.
        mlp: of what MLPs write.
        embed: of the embeddings.
    """

    attention: Float[Tensor, "layer target d_model"]
    mlp: Float[Tensor, "layer target d_model"]
    embed: Float[Tensor, "target d_model"]


@torch.no_grad()
def descend(run: Run, readers: Readers) -> Direct:
    """Take readers down the layers past attention: along the stream, and through skips."""
    f, skipped = run.frozen, dict[int, Tensor]()
    g = readers.vector * (readers.layer >= f.layers)[:, None]
    inside = (readers.position >= run.units.leading)[:, None]
    attention, mlp = [g] * f.layers, [g] * f.layers
    for i in reversed(range(f.layers)):
        mlp[i] = g
        for skip in run.units.skips:
            if skip.written == i:
                skipped[skip.read] = skipped.get(skip.read, 0.0) + (g @ skip.matrix) * inside
        joined = g + readers.vector * (readers.layer == i)[:, None]
        if i in skipped:
            joined = joined + f.mlp_readers(i, skipped.pop(i), readers.position)
        attention[i] = g if f.anatomy.parallel else joined  # a parallel MLP reads the stream before attention, too
        g = joined
    return Direct(torch.stack(attention), torch.stack(mlp), g)


def _loadings(run: Run, sources: Sequence[Steps], readers: Readers, direct: Direct) -> Float[Tensor, "edge layer head"]:
    """Return what each head carries of each source to the reader beside it."""
    f, each = run.frozen, torch.arange(len(sources), device=readers.vector.device)
    found = []
    for i, x in zip(range(f.layers), ascend(run, sources), strict=False):  # no head follows the last layer
        z = f.heads_of(i, x)[each, readers.position]  # [edge, head, d_head]
        read = (direct.attention[i] @ f.attention[i].into_z).view_as(z)
        found.append((z * read).sum(-1))
    return torch.stack(found, 1).cpu()


def _bypass(sources: Sequence[Steps], readers: Readers, direct: Direct) -> Float[Tensor, "edge"]:
    """Return what each reader reads of its source without attention."""
    out = torch.zeros(len(sources)).to(readers.vector)
    for row, steps in enumerate(sources):
        for place, vector in steps:
            if place.position == int(readers.position[row]):
                read = direct.embed if place.layer is None else direct.mlp[place.layer]
                out[row] += read[row] @ vector
    return out.cpu()
