"""Graphs: traced ones pruned and laid out, their nodes, groups of units, and graph files of other tools."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cutaway import zoo
from cutaway.core.files import read_header, write_json
from cutaway.core.graph import Graph
from cutaway.core.node import Latent, parse_node
from cutaway.core.refuse import Refused
from cutaway.graphs import PRESETS, AttributionGraph, Supernodes, graph_data, prune, read_graph
from cutaway.graphs.grouping import identity
from cutaway.graphs.influence import kind_of
from cutaway.graphs.influence_change import influence_change
from cutaway.graphs.labels import layer_starts
from cutaway.graphs.opening import Edge, around, labels_from, open_graph
from cutaway.studio import graph_messages as m
from cutaway.studio.actions.features import dictionary_of_store, feature_store, opened_store
from cutaway.studio.feature_messages import InStore, LatentOf
from cutaway.studio.folder import PREFIX, shipped
from cutaway.studio.messages import Request
from cutaway.studio.session import Session
from cutaway.views.graph_layout import Layout, layout
from cutaway.views.html import computed

_IMPORTED = "graph-import-"
_MOST_EDGES = 6000  # that are drawn


def graphs(session: Session, request: Request) -> m.Graphs:
    """Return the graphs of the studio, and what could be traced."""
    of_model = zoo.dictionaries(session.source) if zoo.find(session.source) is not None else []
    found = [_card(n, p) for n, p in opened_files(session)]
    return m.Graphs(
        graphs=[card for card in found if card is not None],
        transcoders=[n for n in of_model if "transcoder" in n],
        presets={name: (row.nodes, row.edges) for name, row in PRESETS.items()},
    )


def graph(session: Session, request: m.GraphOf) -> m.GraphPage:
    """Return a graph, pruned by its convention, as the page draws it.

    Raises:
        Refused: no graph, or what `prune` refuses.
    """
    found = _opened(session, request.graph)
    if isinstance(found, Graph):
        return _page(session, request, found, None)
    return _page(session, request, _pruned(session, request, found), found)


def node(session: Session, request: m.NodeOf) -> m.NodePage:
    """Return a node with what it reads and what reads it, in the whole graph."""
    whole = _whole(session, request)
    found, titles = around(whole, request.node), _titles(session, whole)
    return m.NodePage(
        node=found.node,
        title=titles.get(found.node, ""),
        influence=found.influence,
        null=found.null,
        activation=found.activation,
        value=found.value,
        inputs=_links(found.inputs, titles),
        outputs=_links(found.outputs, titles),
        page=_latent_of(session, whole, request.node),
    )


def compare_graphs(session: Session, request: m.TwoGraphs) -> m.GraphChange:
    """Return the influences of nodes in one graph less those in another, and what one of them has alone.

    Raises:
        Refused: no graph, or a file without influences.
    """
    both = [_opened(session, name) for name in (request.graph, request.other)]
    found = influence_change(*both)
    titles = [_titles(session, g) if isinstance(g, AttributionGraph) else {} for g in both]
    words = [" / ".join(dict.fromkeys(t[n] for t in titles if t.get(n))) for n in found.change]
    first_only, second_only = found.alone()
    rows = [
        m.NodeChange(node=n, title=w, first=found.first.get(n), second=found.second.get(n), change=v)
        for (n, v), w in zip(found.change.items(), words, strict=True)
    ]
    sizes = [len(g.words) if isinstance(g, AttributionGraph) else 0 for g in both]
    why = "The prompts have unlike numbers of tokens" + (f" ({sizes[0]} and {sizes[1]})" if all(sizes) else "")
    return m.GraphChange(
        rows=rows[: request.most],
        nodes=len(rows),
        common=len(found.first.keys() & found.second.keys()),
        first_only=first_only,
        second_only=second_only,
        pooled=f"{why}: positions do not line up, and each node is added up over all positions." * found.pooled,
    )


def keep_groups(session: Session, request: m.GroupsOf) -> m.Kept:
    """Keep groups of a graph's units in a file, which `graphs.supernodes` takes as `groups`."""
    whole = _whole(session, request)
    found = _supernodes(whole, request.supernodes)
    found.check(whole)
    name = _hashed("groups", {"graph": request.graph, "groups": request.supernodes})
    found.save(session.folder.new_group(name))
    return m.Kept(id=name)


def import_graph(session: Session, request: m.ForeignGraph) -> m.Kept:
    """Read a graph file of circuit-tracer or Neuronpedia and keep it as a result.

    Raises:
        Refused: what is not of the schema.
    """
    name = _hashed(_IMPORTED.rstrip("-"), {"data": request.data})
    file = write_json(session.folder.empty / f"{name}.json", request.data)
    try:
        found = read_graph(file)
    except Refused as refusal:
        raise Refused(f"graph {request.name!r}", refusal.why, refusal.instead) from None
    finally:
        file.unlink()
    found.save(session.folder.new_result(name))
    return m.Kept(id=name)


def export_graph(session: Session, request: m.GraphOf) -> m.GraphFile:
    """Return the pruned graph as a file of circuit-tracer and Neuronpedia."""
    whole = _whole(session, request)
    small, slug = _pruned(session, request, whole), request.graph.removeprefix(PREFIX)
    return m.GraphFile(data=graph_data(whole, small, slug=slug, scan=session.name, labels=_labels(session, whole)))


# --- what is opened


def opened_files(session: Session) -> Iterable[tuple[str, Path]]:
    """Yield the id and the place of each file that was opened, then of each result, the newest first."""
    for name, path in session.folder.files.items():
        if path.suffix in (".json", ".pt", ".safetensors"):
            yield f"{PREFIX}{name}", path
    results = session.folder.results.glob("*.safetensors")
    for path in sorted(results, key=lambda p: p.stat().st_mtime, reverse=True):
        yield path.stem, path


def _card(name: str, path: Path) -> m.GraphCard | None:
    """Return the card of a graph; None for other files."""
    if path.suffix != ".safetensors":
        return m.GraphCard(id=name, name=path.name, prompt="")
    header = read_header(path)
    imported = path.stem.startswith(_IMPORTED) and header.get("kind") == Graph.kind
    if header.get("kind") != AttributionGraph.kind and not imported:
        return None
    prompt = header.get("record", {}).get("prompt", "")
    shown = prompt if isinstance(prompt, str) else ""
    return m.GraphCard(id=name, name="imported" if imported else path.name, prompt=shown)


def _opened(session: Session, name: str) -> AttributionGraph | Graph:
    place = session.folder.placed("graph", name) if name.startswith(PREFIX) else session.folder.result(name)
    found = session.keep(("graph", str(place)), lambda: open_graph(Path(place)))
    if not isinstance(found, AttributionGraph | Graph):
        raise Refused(f"graph {name!r}", f"it is a {found.kind}", "choose one of the list of graphs")
    return found


def _whole(session: Session, request: m.GraphNamed) -> AttributionGraph:
    found = _opened(session, request.graph)
    if not isinstance(found, AttributionGraph):
        why = "the file holds a graph that is pruned already"
        raise Refused(f"graph {request.graph!r}", why, "trace it here, or open the whole graph")
    return found


def _pruned(session: Session, request: m.GraphOf, whole: AttributionGraph) -> Graph:
    options = {"nodes": request.nodes, "edges": request.edges, "pinned": tuple(request.pinned)}
    groups = _supernodes(whole, request.supernodes) if request.supernodes else None
    return prune(whole, request.preset, **options, supernodes=groups, labels=_labels(session, whole))


def _supernodes(whole: AttributionGraph, groups: m.Groups) -> Supernodes:
    return Supernodes({name: tuple(nodes) for name, nodes in groups.items()}, identity(whole))


def _labels(session: Session, whole: AttributionGraph) -> dict[str, str]:
    """Return the labels that some store of the studio has for the features of a graph."""
    place = _store_of(session, whole)
    if place is None:
        return {}
    store = opened_store(session, place)[0]
    key = ("labels", store.manifest["key"], hash(tuple(whole.labels["node"])), store.meta.stamp())
    with suppress(Refused):  # of transcoders that are not where they were
        return session.keep(key, lambda: labels_from(whole, store))
    return {}


def _store_of(session: Session, whole: AttributionGraph) -> InStore | None:
    """Return the first store of the studio that has the features of a graph."""
    own = whole.record.get("subjects", {}).get("transcoders", {}).get("hash")
    for name in session.folder.store_names() if own else ():
        store = feature_store(session, name)
        for dictionary in store.names:
            row = store.latents(dictionary).row
            if row["hash"] == own and row["opened"]:
                return InStore(store=name, dictionary=dictionary)
    return None


def _latent_of(session: Session, whole: AttributionGraph, name: str) -> LatentOf | None:
    """Return the latent of a store that a node is; None of other nodes, and where no store has it."""
    found, place = parse_node(name), _store_of(session, whole)
    if not isinstance(found, Latent) or place is None:
        return None
    store, dictionary = opened_store(session, place)
    starts = layer_starts(dictionary_of_store(session, store, dictionary))
    return LatentOf(store=place.store, dictionary=dictionary, latent=starts[found.block] + found.index)


def _titles(session: Session, whole: AttributionGraph) -> dict[str, str]:
    """Return the words of nodes: labels of units, tokens, and targets."""
    tokens = [
        (n, x.position or 0) for n, x in zip(whole.labels["node"], whole.nodes, strict=True) if kind_of(x) == "token"
    ]
    words = {name: whole.words[position] for name, position in tokens}
    return words | whole.texts | _labels(session, whole)


# --- what is drawn


def _page(session: Session, request: m.GraphOf, small: Graph, whole: AttributionGraph | None) -> m.GraphPage:
    placed, pruning = layout(small), small.record.get("pruning", {})
    order = small.weight.abs().argsort(descending=True, stable=True)[:_MOST_EDGES].tolist()
    ends = zip(small.source[order].tolist(), small.target[order].tolist(), small.weight[order].tolist(), strict=True)
    scores = small.record.get("scores")
    return m.GraphPage(
        graph=request.graph,
        prompt=str(small.record.get("prompt", "")),
        targets=list(whole.target_words) if whole else [],
        depths=list(placed.depths),
        columns=list(placed.columns),
        starts=list(placed.starts),
        nodes=_nodes(small, placed),
        edges=[m.GraphEdge(source=s, target=t, weight=w) for s, t, w in ends],
        hidden=len(small.weight) - len(order),
        whole=_scores(whole) if whole else None,
        drawn=m.Scores(**scores) if scores else None,
        all_nodes=len(whole.influence) if whole else None,
        all_edges=int((whole.weight != 0).sum()) if whole else None,
        preset=request.preset,
        node_share=pruning.get("nodes"),
        edge_share=pruning.get("edges"),
        call=_call(session, whole) if whole else None,
        how=computed([small]),
        **_again(session, request, pruning),
    )


def _nodes(small: Graph, placed: Layout) -> list[m.GraphNode]:
    known = small.labels.get("attribute", [])
    columns = {n: small.attribute(n).tolist() for n in known}
    titles = small.titles or [""] * len(placed.boxes)
    return [
        m.GraphNode(
            name=name,
            kind=kind_of(which),
            title=title,
            depth=box.depth,
            column=box.column,
            slot=box.slot,
            group=group,
            weak=box.weak,
            influence=columns["influence"][i] if "influence" in columns else None,
            **{n: columns[n][i] if n in columns else 0.0 for n in ("cumulative", "activation", "share")},
        )
        for i, (name, which, title, box, group) in enumerate(
            zip(
                small.labels["node"], small.nodes, titles, placed.boxes, small.groups or [""] * len(titles), strict=True
            )
        )
    ]


def _scores(whole: AttributionGraph) -> m.Scores:
    return m.Scores(
        replacement=float(whole.replacement),
        completeness=float(whole.completeness),
        error_share=float(whole.error_share),
        others_share=float(whole.others_share),
    )


def _call(session: Session, whole: AttributionGraph) -> dict[str, Any] | None:
    """Return the values of a form that mean the same graph, for methods that test it; None if they cannot be said."""
    record, options = whole.record, whole.record.get("options", {})
    subjects, prompt = record.get("subjects", {}), record.get("prompt")
    name = subjects.get("transcoders", {}).get("name", "")
    ids = [f"{PREFIX}{i}" for i, p in session.folder.files.items() if str(p) == name]
    units = (
        {"neurons": True} if "neurons" in subjects else {"transcoders": name if shipped(name) else next(iter(ids), "")}
    )
    if not isinstance(prompt, str) or not all(units.values()) or subjects.get("task"):
        return None
    kept = {n: options[n] for n in ("targets", "nodes", "leading") if options.get(n) not in (None, [], ())}
    return {"prompts": prompt, **units, **kept}


def _again(session: Session, request: m.GraphOf, pruning: dict[str, Any]) -> dict[str, str]:
    """Return the pruning in Python and on the command line."""
    if not pruning:
        return {"python": "no call: the graph was imported", "command": "no command: the graph was imported"}
    name = request.graph
    place = session.folder.placed("graph", name) if name.startswith(PREFIX) else str(session.folder.result(name))
    said = f"{request.preset!r}, nodes={pruning['nodes']}, edges={pruning['edges']}, pinned={tuple(request.pinned)!r}"
    flags = f"--preset {request.preset} --nodes {pruning['nodes']} --edges {pruning['edges']}"
    flags += f" --pinned {','.join(request.pinned)}" if request.pinned else ""
    return {"python": f"ca.graphs.prune(ca.open({place!r}), {said})", "command": f"cutaway graphs show {place} {flags}"}


def _links(edges: list[Edge], titles: dict[str, str]) -> list[m.GraphLink]:
    return [m.GraphLink(node=n, title=titles.get(n, ""), weight=w, share=s) for n, w, s in edges]


def _hashed(kind: str, data: dict[str, Any]) -> str:
    return f"{kind}-{hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]}"
