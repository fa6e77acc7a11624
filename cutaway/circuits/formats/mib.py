"""Circuits in the files of EAP-IG and of the Mechanistic Interpretability Benchmark: JSON, and .pt of plain tensors.

Both hold a score of every edge and if it is in the circuit. Their heads have keys and values of their own; where heads
share them here, a group's score is the sum of its heads', and written it is divided evenly among them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.circuit import Circuit
from cutaway.circuits.formats.names import mib_readers, mib_writer, read_edge
from cutaway.core.address import Address
from cutaway.core.files import read_json, write_json
from cutaway.core.node import Edge
from cutaway.core.pt import read_pt, write_pt
from cutaway.core.refuse import Refused
from cutaway.models.edits.wiring import Wiring
from cutaway.models.model import Model

_NEEDS = {".json": {"cfg", "nodes", "edges"},
          ".pt": {"cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph"}}  # fmt: skip


def read_mib(path: Path, chosen: bool = False) -> Circuit:
    """Read a circuit of EAP-IG or MIB.

    Args:
        path: the file.
        chosen: take the edges that the file says are in the circuit, without scores.

    Raises:
        Refused: no such file, or one of another form.
    """
    found = read_json(path) if path.suffix == ".json" else read_pt(path)
    data = found if isinstance(found, dict) else {}
    if missing := _NEEDS[path.suffix] - data.keys():
        raise Refused(f"file {str(path)!r}", f"it lacks {', '.join(sorted(missing))}", "give a graph of EAP-IG or MIB")
    rows = _json_rows(data) if path.suffix == ".json" else _pt_rows(data)
    if chosen:
        rows = [row for row in rows if row[2]]
    scores = None if chosen else torch.tensor([score for _, score, _ in rows])
    return Circuit(path.name, tuple(edge for edge, _, _ in rows), scores, per_head=True)


def write_mib(
    path: str | Path,
    model: Model,
    wiring: Wiring,
    scores: Float[Tensor, "edge"],
    kept: Bool[Tensor, "writer reader"] | None = None,
) -> Path:
    """Write the scores of all edges, NaN as 0, as the ending says: .json or .pt.

    Args:
        kept: the circuit; None of a mere ranking.

    Raises:
        Refused: another ending.
    """
    path = Path(path)
    if path.suffix not in _NEEDS:
        raise Refused(f"file {str(path)!r}", "graphs of MIB end in .json or .pt", "choose one of the two")
    s = model.shape
    share = s.n_heads // s.n_kv_heads
    cfg = {
        "n_layers": s.n_layers,
        "n_heads": s.n_heads,
        "parallel_attn_mlp": model.anatomy.parallel,
        "d_model": s.d_model,
    }
    readers = [name for layer in range(s.n_layers) for name in _readers(layer, s.n_heads)] + ["logits"]
    writers = [mib_writer(u) for u in wiring.writers]
    column = {name: i for i, name in enumerate(readers)}
    value, inside = (torch.zeros(len(writers), len(readers), dtype=t) for t in (torch.float32, torch.bool))
    real = torch.zeros_like(inside)
    for (u, v), score in zip(wiring.pairs.tolist(), scores.nan_to_num(0.0).tolist(), strict=True):
        names = mib_readers(wiring.readers[v], share)
        at = [column[n] for n in names]
        value[u, at], real[u, at] = score / len(names), True
        inside[u, at] = kept is not None and bool(kept[u, v])
    nodes = inside.any(1)
    if path.suffix == ".pt":
        held = {"edges_scores": value, "edges_in_graph": inside, "nodes_in_graph": nodes}
        return write_pt(path, {"cfg": cfg, "src_nodes": writers, "dst_nodes": readers, **held})
    edges = {
        f"{writers[u]}->{readers[v]}": {"score": float(value[u, v]), "in_graph": bool(inside[u, v])}
        for u, v in real.nonzero().tolist()
    }
    named = {n: {"in_graph": on} for n, on in zip(writers, nodes.tolist(), strict=True)} | {
        "logits": {"in_graph": True}
    }
    return write_json(path, {"cfg": cfg, "nodes": named, "edges": edges})


def _readers(layer: int, heads: int) -> list[str]:
    """Return the columns of a layer in their tensors."""
    branches = [Address(f"{letter}_in", layer, h) for letter in "qkv" for h in range(heads)]
    return [name for v in (*branches, Address("mlp_in", layer)) for name in mib_readers(v)]


def _json_rows(data: dict[str, Any]) -> list[tuple[Edge, float, bool]]:
    return [(read_edge(name), float(e["score"]), bool(e["in_graph"])) for name, e in data["edges"].items()]


def _pt_rows(data: dict[str, Any]) -> list[tuple[Edge, float, bool]]:
    """Return the pairs that are edges: a writer, and a reader after it."""
    score, inside, parallel = data["edges_scores"], data["edges_in_graph"], bool(data["cfg"]["parallel_attn_mlp"])
    pairs = ((i, j) for i in range(score.shape[0]) for j in range(score.shape[1]))
    named = ((read_edge(f"{data['src_nodes'][i]}->{data['dst_nodes'][j]}"), i, j) for i, j in pairs)
    return [(e, float(score[i, j]), bool(inside[i, j])) for e, i, j in named if _hears(e, parallel)]


def _hears(edge: Edge, parallel: bool) -> bool:
    u, v = edge.source, edge.target
    assert isinstance(u, Address)
    assert isinstance(v, Address)
    if u.layer is None or v.layer is None:
        return True
    return u.layer < v.layer or (u.layer == v.layer and (u.site, v.site) == ("z", "mlp_in") and not parallel)
