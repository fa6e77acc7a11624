"""Circuits: scores of edges, the first of them as a graph of components, and the truth of compiled programs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.circuits import EdgeScores
from cutaway.circuits.components import belongs
from cutaway.core.files import read_header
from cutaway.core.form import form
from cutaway.core.graph import graph
from cutaway.core.node import parse_edge
from cutaway.core.refuse import Refused
from cutaway.core.result import open_result
from cutaway.interventions.edge_truth import ABLATIONS, identifiable
from cutaway.models.edits.wiring import Wiring, wiring
from cutaway.studio import circuit_messages as m
from cutaway.studio.actions.graphs import opened_files
from cutaway.studio.folder import PREFIX
from cutaway.studio.graph_messages import GraphNode
from cutaway.studio.messages import Request
from cutaway.studio.session import Session
from cutaway.views.graph_layout import layout
from cutaway.views.html import computed
from cutaway.zoo.compiled import structural

_USUAL = 20  # edges of a circuit whose truth is not known


def circuits(session: Session, request: Request) -> m.Circuits:
    """Return the scores of edges that the studio has of a model."""
    found = [_card(session, name, path) for name, path in opened_files(session) if path.suffix == ".safetensors"]
    return m.Circuits(circuits=[card for card in found if card is not None])


def circuit(session: Session, request: m.CircuitOf) -> m.CircuitPage:
    """Return the first edges of a ranking as a graph of components, with what the truth has of them.

    Raises:
        Refused: no scores of edges, or scores of another model.
    """
    scores, w = _opened(session, request.circuit), session.keep("wiring", lambda: wiring(session.model))
    if lost := set(scores.labels["edge"]) - {str(e) for e in w.edges}:
        why = f"the model has no edge {sorted(lost)[0]}"
        raise Refused(f"circuit {request.circuit!r}", why, "choose the model of the scores")
    call = _call(session, scores.record)
    truths = _truths(session, scores, w, call)
    order = scores.score.abs().nan_to_num(-1.0).argsort(descending=True, stable=True)
    order = order[scores.score[order].isfinite()]
    known = truths.get(request.truth)
    size = request.edges or (len(known) if known else _USUAL)
    inside, rest = order[:size].tolist(), order[size:].tolist()
    missed = [i for i in rest if scores.labels["edge"][i] in (known or ())]
    return m.CircuitPage(
        circuit=request.circuit,
        method=str(scores.record.get("method", "")),
        task=_task(scores.record),
        unit=scores.units.get("score", ""),
        **_drawn(scores, w, [*inside, *missed], known, len(inside)),
        inside=len(inside),
        all_edges=len(w.edges),
        truths=truths,
        call={**call, "circuit": _meant(request.circuit)},
        how=computed([scores]),
        python=str(scores.record.get("python", "")),
        command=str(scores.record.get("command", "")),
    )


def _card(session: Session, name: str, path: Path) -> m.CircuitCard | None:
    """Return the card of scores of this model's edges; None of other files."""
    header = read_header(path)
    record = header.get("record", {})
    own = record.get("subjects", {}).get("model", {}).get("name") == session.source
    if header.get("kind") != EdgeScores.kind or not (own or name.startswith(PREFIX)):
        return None
    return m.CircuitCard(id=name, method=str(record.get("method", "")), task=_task(record))


def _opened(session: Session, name: str) -> EdgeScores:
    place = session.folder.placed("circuit", name) if name.startswith(PREFIX) else session.folder.result(name)
    found = session.keep(("circuit", str(place)), lambda: open_result(Path(place)))
    if not isinstance(found, EdgeScores):
        raise Refused(f"circuit {name!r}", f"it is a {found.kind}", "choose one of the list of scores")
    return found


def _meant(name: str) -> str:
    return name if name.startswith(PREFIX) else f"{PREFIX}{name}"


def _task(record: dict[str, Any]) -> str:
    task = record.get("subjects", {}).get("task")
    return f"{task.get('name', 'a task')}, {task.get('prompts', '?')} prompts" if task else "no task"


def _call(session: Session, record: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a form that mean the task of some scores, as their command has them."""
    words = shlex.split(str(record.get("command", "")))
    said = dict(zip(words, [*words[1:], ""], strict=True))
    entries = [e for e in form(session.method("circuits.exact")) if e.subject == "task"]
    found = {e.name: (e.type, said[flag]) for e in entries if (flag := f"--{e.name.replace('_', '-')}") in said}
    return {n: True if kind == "boolean" else int(v) if kind == "integer" else v for n, (kind, v) in found.items()}


# --- the truth


def _truths(session: Session, scores: EdgeScores, w: Wiring, call: dict[str, Any]) -> dict[m.Truth, list[str]]:
    """Return the edges of the program that was compiled into the model, and those of them that prompts can show."""
    names = [str(e) for e in w.edges]

    def named(mask: Bool[Tensor, "edge"]) -> list[str]:
        return [n for n, x in zip(names, mask.tolist(), strict=True) if x]

    try:
        program = structural(session.model, w)
    except Refused:  # of other models no circuit is known
        return {}
    found: dict[m.Truth, list[str]] = {"structural": named(program[w.pairs[:, 0], w.pairs[:, 1]])}
    how = scores.record.get("options", {}).get("how", "corrupt")
    if call and how in ABLATIONS:
        (_, task), _ = session.opened(session.method("circuits.exact"), call)
        key = ("identifiable", how, *call.items())
        found["identifiable"] = named(session.keep(key, lambda: identifiable(session.model, task, w, how)))
    return found


# --- what is drawn


def _drawn(scores: EdgeScores, w: Wiring, edges: list[int], known: list[str] | None, inside: int) -> dict[str, Any]:
    """Return nodes, edges and layout: a component is one node, and what heads share leads to each of them."""
    into = _components(w)
    ends = [parse_edge(scores.labels["edge"][i]) for i in edges]
    each = [(n, f"{e.source}→{v}") for n, e in enumerate(ends) for v in into[str(e.target)]]
    drawn = graph([name for _, name in each], scores.score[[edges[n] for n, _ in each]])
    placed = layout(drawn)
    ways = zip(each, drawn.source.tolist(), drawn.target.tolist(), strict=True)
    return {
        "depths": list(placed.depths),
        "columns": [""],
        "starts": list(placed.starts),
        "nodes": [_node(name, b.depth, b.slot) for name, b in zip(drawn.labels["node"], placed.boxes, strict=True)],
        "edges": [_edge(scores, edges[n], s, t, known, n < inside) for (n, _), s, t in ways],
    }


def _components(w: Wiring) -> dict[str, list[str]]:
    """Return the components whose reader each reader is, by its name; the logits are their own."""
    of = belongs(w)
    rows: list[Int[Tensor, "component"]] = [of[:, i].nonzero()[:, 0] for i in range(len(w.readers))]
    return {str(v): [str(w.writers[u]) for u in r.tolist()] or [str(v)] for v, r in zip(w.readers, rows, strict=True)}


_KINDS = {"embed": "token", "z": "unit", "mlp_out": "mlp", "logits": "target"}


def _node(name: str, depth: int, slot: float) -> GraphNode:
    site, _, place = name.partition(".")
    title = {"z": place, "mlp_out": f"MLP {place}"}.get(site, name)
    return GraphNode(
        name=name,
        kind=_KINDS.get(site, "unit"),
        title=title,
        depth=depth,
        column=0,
        slot=slot,
        group="",
        weak=False,
        influence=None,
        cumulative=0.0,
        activation=0.0,
        share=0.0,
    )


def _edge(scores: EdgeScores, i: int, source: int, target: int, known: list[str] | None, inside: bool) -> m.CircuitEdge:
    name = scores.labels["edge"][i]
    exact = None if scores.exact is None or scores.exact[i].isnan() else float(scores.exact[i])
    return m.CircuitEdge(
        name=name,
        source=source,
        target=target,
        weight=float(scores.score[i]),
        interval=_ends(scores.interval[i]),
        control=_ends(scores.null[i]),
        exact=exact,
        known="" if known is None else "missed" if not inside else "found" if name in known else "beyond",
    )


def _ends(values: Float[Tensor, "value"]) -> tuple[float, float] | None:
    """Return the smallest and the largest number; None if there is none."""
    some = values[values.isfinite()]
    return (float(some.min()), float(some.max())) if len(some) else None
