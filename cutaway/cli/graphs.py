"""`cutaway graphs show`, `export`, `group` and `stability`: traced graphs as pictures, in files of other tools, in
groups, and compared.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cutaway.cli.method_commands import reply
from cutaway.cli.output import OUT_HELP
from cutaway.cli.shell import Reply
from cutaway.core.method import parse_list
from cutaway.core.refuse import Keyword, Refused

if TYPE_CHECKING:
    from cutaway.core.graph import Graph
    from cutaway.graphs import AttributionGraph, Supernodes

File = Annotated[Path, Parameter(help="a graph: .safetensors of `graphs trace`, or .pt and .json of circuit-tracer")]
Preset = Annotated[
    str | None,
    Parameter(
        help="convention of pruning: circuit-tracer, paper, neuronpedia, llamascopium, arena [default: the first]"
    ),
]
Nodes = Annotated[float | None, Parameter(help="share of influence that nodes hold [default: the preset's]")]
Edges = Annotated[float | None, Parameter(help="share of scores that edges hold [default: the preset's]")]
Pinned = Annotated[str, Parameter(help="nodes that stay whatever their influence, such as latent.3.17@5")]

Grouped = Annotated[
    Path | None, Parameter(help="supernodes: the .json file of `graphs group`, or the result of `graphs supernodes`")
]

Store = Annotated[Path | None, Parameter(help="store of features whose labels name the nodes (`features explain`)")]


def show(
    file: File,
    *,
    preset: Preset = None,
    nodes: Nodes = None,
    edges: Edges = None,
    pinned: Pinned = "",
    supernodes: Grouped = None,
    store: Store = None,
    out: Annotated[Path | None, Parameter(help=OUT_HELP)] = None,
) -> Reply:
    """Show the main part of a traced graph: a page, figure or list of its nodes and edges."""
    return reply(_pruned(file, preset, nodes, edges, pinned, supernodes, store)[1], out)


def export(
    file: File,
    *,
    out: Annotated[Path, Parameter(help="the .json file that is written")],
    preset: Preset = None,
    nodes: Nodes = None,
    edges: Edges = None,
    pinned: Pinned = "",
    supernodes: Grouped = None,
    store: Store = None,
    slug: Annotated[str, Parameter(help="name of the graph [default: that of the file]")] = "",
    scan: Annotated[str, Parameter(help="name of the transcoders in the viewer, or ./data/FOLDER of pages")] = "model",
    source_set: Annotated[str, Parameter(help="where Neuronpedia has pages of the features, such as org/name")] = "",
    pages: Annotated[str, Parameter(help="address of the folder of feature pages")] = "",
) -> Reply:
    """Write the main part of a traced graph for circuit-tracer's viewer and Neuronpedia; nothing is uploaded."""
    from cutaway.graphs import write_graph

    whole, small = _pruned(file, preset, nodes, edges, pinned, supernodes, store)
    if whole is None:
        why = "it holds no whole graph, only a pruned one"
        raise Refused(f"file {str(file)!r}", why, "give a graph of `cutaway graphs trace`")
    given = {"neuronpedia_source_set": source_set, "feature_json_base_url": pages}
    details = {name: value for name, value in given.items() if value}
    labels = _labels(whole, store)
    write_graph(out, whole, small, slug=slug or file.stem, scan=scan, details=details, labels=labels)
    size = out.stat().st_size
    words = f"{len(small.depth)} nodes, {len(small.weight)} edges, {size / 1024:.0f} KiB: {out}"
    upload = [] if scan.startswith("./") else _uploading(out, size)

    def shown(console: Any) -> None:
        console.print(words, style="bold", markup=False, soft_wrap=True)
        for line in ["to put it on Neuronpedia yourself:", *upload] if upload else []:
            console.print(line, style="dim", markup=False, soft_wrap=True)

    data = {"file": str(out), "nodes": len(small.depth), "edges": len(small.weight), "bytes": size}
    return Reply({**data, "upload": upload}, shown)


def group(
    file: Annotated[Path, Parameter(help="the .safetensors of `graphs supernodes`")],
    *,
    out: Annotated[Path, Parameter(help="the .json file that is written")],
) -> Reply:
    """Write supernodes as a file to edit: to be tested with `graphs supernodes --groups`, or shown and exported."""
    found = _groups(file)
    found.save(out)
    words = f"{len(found.groups)} supernodes of {sum(map(len, found.groups.values()))} units: {out}"
    groups = {name: list(nodes) for name, nodes in found.groups.items()}
    return Reply(
        {"file": str(out), "supernodes": groups}, lambda console: console.print(words, style="bold", markup=False)
    )


def stability(
    *files: Annotated[Path, Parameter(help="graphs of paraphrases: .safetensors of `graphs trace`, or .pt")],
    share: Annotated[float, Parameter(help="share of influence that kept nodes hold")] = 0.8,
    top: Annotated[int, Parameter(help="how many units are listed")] = 20,
    samples: Annotated[int, Parameter(help="how many draws of random units make the null")] = 20,
    seed: Annotated[int, Parameter(help="of the draws")] = 0,
    out: Annotated[Path | None, Parameter(help=OUT_HELP)] = None,
) -> Reply:
    """Compare the units that the graphs of several prompts keep, beside random active ones."""
    from cutaway.graphs import AttributionGraph
    from cutaway.graphs import stability as compared
    from cutaway.graphs.opening import open_graph

    found = [open_graph(file) for file in files]
    for file, graph in zip(files, found, strict=True):
        if not isinstance(graph, AttributionGraph):
            raise Refused(f"file {str(file)!r}", "it holds no whole graph", "give a graph of `cutaway graphs trace`")
    whole = [g for g in found if isinstance(g, AttributionGraph)]
    return reply(compared(whole, share=share, top=top, samples=samples, seed=seed), out)


def _groups(file: Path) -> Supernodes:
    """Return the supernodes of a file: those of a result, or those that were edited.

    Raises:
        Refused: a result of another method.
    """
    from cutaway.core.result import open_result
    from cutaway.graphs import SupernodeEffects, read_supernodes

    if file.suffix == ".json":
        return read_supernodes(file)
    found = open_result(file)
    if not isinstance(found, SupernodeEffects):
        raise Refused(f"file {str(file)!r}", f"it holds a {found.kind}", "give a result of `cutaway graphs supernodes`")
    return found.supernodes


def _labels(whole: AttributionGraph, store: Path | None) -> dict[str, str]:
    """Return the labels that a store has for the features of a graph."""
    if store is None:
        return {}
    from cutaway.features import FeatureStore
    from cutaway.graphs.opening import labels_from

    return labels_from(whole, FeatureStore(store))


def _pruned(
    file: Path,
    preset: str | None,
    nodes: float | None,
    edges: float | None,
    pinned: str,
    supernodes: Path | None,
    store: Path | None,
) -> tuple[AttributionGraph | None, Graph]:
    """Return the traced graph that a file holds, if it is whole, and its main part.

    Raises:
        Refused: a file of something else, or options of pruning for a graph that is pruned already.
    """
    from cutaway.core.graph import Graph
    from cutaway.graphs import PRESETS, AttributionGraph, prune
    from cutaway.graphs.opening import open_graph

    found = open_graph(file)
    if isinstance(found, AttributionGraph):
        row = next(iter(PRESETS)) if preset is None else preset
        groups = None if supernodes is None else _groups(supernodes)
        given = {"nodes": nodes, "edges": edges, "pinned": parse_list(pinned), "supernodes": groups}
        return found, prune(found, row, **given, labels=_labels(found, store))
    if not isinstance(found, Graph):
        raise Refused(f"file {str(file)!r}", f"it holds a {found.kind}", "give a graph of `cutaway graphs trace`")
    given = {"preset": preset, "nodes": nodes, "edges": edges, "pinned": pinned or None}
    given |= {name: str(path) for name, path in (("supernodes", supernodes), ("store", store)) if path is not None}
    named = [Keyword(name, value) for name, value in given.items() if value is not None]
    if named:
        raise Refused(
            named[0], f"the graph of {str(file)!r} is pruned already", "leave it out, or give the whole graph"
        )
    return None, found


def _uploading(file: Path, size: int) -> list[str]:
    """Return the three calls of Neuronpedia's interface that upload a graph."""
    base, json = "https://www.neuronpedia.org/api/graph", '-H "Content-Type: application/json"'
    key = f'-H "X-Api-Key: $KEY" {json}'
    named = shlex.quote(str(file))
    signed = f'{{"filename": "{file.name}", "contentLength": {size}, "contentType": "application/json"}}'
    return [
        f"curl -X POST {base}/signed-put {key} -d {shlex.quote(signed)}",
        f'gzip -c {named} | curl -X PUT "$URL" -H "Content-Encoding: gzip" {json} --data-binary @-',
        f"curl -X POST {base}/save-to-db {key} -d '{{\"putRequestId\": \"'$ID'\"}}'",
    ]
