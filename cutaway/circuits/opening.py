"""Circuits from files, names and lists; the subject `circuit`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cutaway.circuits.circuit import Circuit
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.formats.mib import read_mib
from cutaway.circuits.formats.names import known, read_edge
from cutaway.circuits.published import names, published
from cutaway.core.node import parse_edge
from cutaway.core.refuse import Refused
from cutaway.core.repeat import Made, called
from cutaway.core.result import open_result
from cutaway.core.stats import generator
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.models.edits.wiring import wiring

_HELP = (
    "scores of edges (.safetensors), a graph of MIB or EAP-IG (.json, .pt), a published circuit (ioi, greater_than …), "
    "or components or edges with commas between them (z.9.6,mlp_out.3 or z.9.6->logits)"
)


def open_circuit(source: str | Path | EdgeScores, edges: int = 0) -> Circuit:
    """Return the circuit that a text, a file or scores of edges mean.

    Args:
        source: scores of edges, the path of a file, a published circuit's name, or components or edges with commas.
        edges: of a ranking, how many of its first edges by |score| are taken; 0 for all, or for the circuit that a
            search ended in.

    Raises:
        Refused: none of these, or a number of edges of what has no scores.
    """
    if isinstance(source, EdgeScores):
        return _first(scored(source, ranking=bool(edges)), edges)
    text = str(source)
    flag = str(Path(text).absolute()) if Path(text).is_file() else text
    found = _first(_read(text, bool(edges)), edges)
    how = Made(called("ca.circuits.open", repr(flag), edges=edges or None), {"": flag, "edges": edges or None})
    return replace(found, made=how.of(found, Circuit.identity))


def _first(found: Circuit, edges: int) -> Circuit:
    return found.first(edges) if edges else found


def scored(scores: EdgeScores, name: str = "scores of edges", ranking: bool = False) -> Circuit:
    """Return the ranking that scores of edges are; of a search its circuit, unless its `ranking` is asked for."""
    edges, score = tuple(map(parse_edge, scores.labels["edge"])), scores.score.float().cpu()
    if scores.kept is None or ranking:
        return Circuit(name, edges, score)
    kept = scores.kept.nonzero()[:, 0]
    return Circuit(name, tuple(edges[i] for i in kept.tolist()), score[kept])


def _read(text: str, ranking: bool) -> Circuit:
    path = Path(text).expanduser()
    if path.suffix in (".json", ".pt"):
        return read_mib(path)
    if path.suffix == ".safetensors":
        found = open_result(path)
        if not isinstance(found, EdgeScores):
            raise Refused(f"file {text!r}", f"it holds {found.kind}", "give scores of edges")
        return scored(found, path.name, ranking)
    if text in names():
        return published(text).components()
    parts = [p.strip() for p in re.split(r",(?![^\[]*\])", text) if p.strip()]
    if not parts:
        raise Refused("circuit ''", "it names nothing", f"give {_HELP}")
    if all("->" in p or "→" in p for p in parts):
        theirs = all(map(known, parts))
        return Circuit(text, tuple((read_edge if theirs else parse_edge)(p) for p in parts), per_head=theirs)
    return Circuit(text, nodes=tuple(parts))


def _opened(flags: Mapping[str, Any], given: Mapping[str, Any]) -> Circuit:
    return open_circuit(flags["circuit"], flags["circuit_edges"] or 0)


def _example(given: Mapping[str, Any]) -> Circuit:
    """Return half of all edges, in random order."""
    edges, chance = wiring(given["model"]).edges, generator(0)
    half = [edges[i] for i in torch.randperm(len(edges), generator=chance)[: len(edges) // 2].tolist()]
    return Circuit("random edges", tuple(half), torch.randn(len(half), generator=chance))


def _accept(source: Any) -> Circuit | None:
    return open_circuit(source) if isinstance(source, str | Path | EdgeScores) else None


CIRCUIT = register(
    Subject(
        "circuit",
        Circuit,
        (
            Flag("circuit", str, REQUIRED, _HELP),
            Flag("circuit_edges", int | None, None, "of a ranking, its first edges by |score| [default: all]"),
        ),
        _opened,
        _example,
        needs=("model",),
        accept=_accept,
        advice="ca.circuits.open(file, name or list), or scores of edges",
    )
)
