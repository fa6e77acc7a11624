"""Graph files of circuit-tracer and Neuronpedia (JSON, schema version 1), written and read.

`write_graph` prunes a traced graph and writes it; `read_graph` reads any file of the schema, as far as its nodes are
those of MLPs. Ids are unique: a feature is `LAYER_NUMBER_POSITION`, a token `E_ID_POSITION`, a logit
`LAYERS+1_ID_POSITION`, an error `LAYER_error_mlp_POSITION` (circuit-tracer's own, `0_LAYER_POSITION`, is the id of a
feature of layer 0, too). Neurons are written as features, for viewers know no other unit. Labels are plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cutaway.core.address import Address
from cutaway.core.cantor import cantor
from cutaway.core.files import read_json, write_text
from cutaway.core.graph import Graph, graph
from cutaway.core.node import Direction, Edge, Error, Latent, Logit, Node, Others
from cutaway.core.record import versions
from cutaway.core.refuse import Keyword, Refused
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.prune import prune
from cutaway.graphs.schema import faults, graph_schema
from cutaway.graphs.units import latent_node, neuron_node

_LARGEST = 100 << 20  # bytes that Neuronpedia takes
_LOCAL = re.compile(r"\./[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
_FEATURE, _ERROR, _TOKEN, _LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"


@dataclass(frozen=True)
class _Names:
    """The words of a traced graph's nodes in a file.

    Attributes:
        whole: the graph.
        labels: labels of nodes by their name here.
    """

    whole: AttributionGraph
    labels: Mapping[str, str]

    def node(self, node: Node, shown: Mapping[str, float]) -> dict[str, Any]:
        """Return the entry of one node; `shown` are its numbers."""
        position = node.position or 0
        word = self.whole.words[position]
        match node:
            case Latent(block=layer, index=number) | Address(site="mlp_post", layer=int(layer), unit=int(number)):
                name = "" if isinstance(node, Latent) else f"neuron {layer}.{number}"
                own = [f"{layer}_{number}_{position}", f"{layer}_{number}-0", _FEATURE, name, str(layer)]
                feature: int | None = cantor(layer, number)
            case Error(block=layer) | Others(block=layer):
                kind, said = ("error", "Err") if isinstance(node, Error) else ("others", "units left out")
                said = f'{said}: mlp {layer} "{plain(word)}"'
                own = [f"{layer}_{kind}_mlp_{position}", f"{layer}_{position}-0", _ERROR, said, str(layer)]
                feature = -1
            case Logit() | Direction():
                own, feature = self._target(node, position, shown["share"])
            case _:
                token = self.whole.ids[position]
                first = "E" if str(node).startswith("embed") else "P"
                said = f'{"Emb" if first == "E" else "Pos"}: "{plain(word)}"'
                own = [f"{first}_{token}_{position}", f"{first}_{token}-{position}", _TOKEN, said, "E"]
                feature = position
        entry = dict(zip(("node_id", "jsNodeId", "feature_type", "clerp", "layer"), own, strict=True))
        entry |= {"clerp": plain(self.labels[str(node)])} if str(node) in self.labels else {}
        entry |= {"feature": feature, "ctx_idx": position, "run_idx": 0, "reverse_ctx_idx": 0}
        target = isinstance(node, Logit | Direction)
        entry |= {"unit": "neuron"} if isinstance(node, Address) and node.site == "mlp_post" else {}
        return entry | {
            "is_target_logit": target,
            "token_prob": shown["share"] if target else 0.0,
            "influence": None if target else shown["cumulative"],
            "activation": shown["activation"] if entry["feature_type"] == _FEATURE else None,
        }

    def _target(self, node: Logit | Direction, position: int, share: float) -> tuple[list[str], int]:
        """Return the words of a target; differences and directions get ids behind the vocabulary."""
        text = self.whole.texts.get(str(node), str(node))
        plain_logit = isinstance(node, Logit) and node.foil is None
        own = [n for n in self.whole.labels["target"] if n.startswith(("logit", "direction"))]
        token = node.token if plain_logit and isinstance(node, Logit) else self.whole.vocabulary + own.index(str(node))
        layer = self.whole.layers + 1
        said = f'Output "{plain(text)}" (p={share:.3f})'
        return [f"{layer}_{token}_{position}", f"L_{token}-{position}", _LOGIT, said, str(layer)], token


def plain(text: str) -> str:
    """Return a text without quotes and line breaks, which viewers parse labels by."""
    return text.replace('"', "'").replace("\n", "⏎").replace("\r", "⏎")


def graph_data(
    whole: AttributionGraph,
    pruned: Graph | None = None,
    *,
    slug: str = "graph",
    scan: str = "model",
    labels: Mapping[str, str] | None = None,
    details: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what a graph file holds.

    Args:
        whole: the traced graph.
        pruned: the part of it that is written, its groups as supernodes [default: that of the preset circuit-tracer].
        slug: name of the graph; other characters than letters, digits, `_.-` become hyphens.
        scan: name of the model, or of the set of transcoders; `./data/FOLDER` are pages beside the graph on the local
            server of circuit-tracer (`cutaway features export`), which Neuronpedia does not take.
        labels: labels of nodes, by their names here.
        details: where feature pages come from (`feature_json_base_url`, `neuronpedia_source_set`).

    Raises:
        Refused: a slug or scan without a letter.
    """
    pruned = prune(whole) if pruned is None else pruned
    names, nodes = _Names(whole, labels or {}), pruned.nodes
    columns = {n: pruned.attribute(n).tolist() for n in ("cumulative", "activation", "share")}
    entries = [names.node(node, {n: v[i] for n, v in columns.items()}) for i, node in enumerate(nodes)]
    ids = [e["node_id"] for e in entries]
    named = [name for name in dict.fromkeys(pruned.groups) if name]
    groups = [[name, *(i for i, g in zip(ids, pruned.groups, strict=True) if g == name)] for name in named]
    ends = zip(pruned.source.tolist(), pruned.target.tolist(), pruned.weight.tolist(), strict=True)
    pruning = pruned.record.get("pruning", {})
    source_set = (details or {}).get("neuronpedia_source_set")
    info = {"generator": {"name": "cutaway", "version": versions()["cutaway"]}}
    info |= {"neuronpedia_source_set": source_set} if source_set else {}
    return {
        "metadata": {
            "slug": _name("slug", slug),
            "scan": scan if _LOCAL.fullmatch(scan) else _name("scan", scan),
            "prompt": "".join(whole.words),
            "prompt_tokens": list(whole.words),
            "node_threshold": pruning.get("nodes"),
            "schema_version": 1,
            "feature_details": dict(details or {}),
            "info": info,
            "generation_settings": {k: whole.record.get("options", {}).get(k) for k in ("nodes", "logits", "mass")},
            "pruning_settings": {"node_threshold": pruning.get("nodes"), "edge_threshold": pruning.get("edges")},
        },
        "qParams": {"linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": groups, "sg_pos": ""},
        "nodes": entries,
        "links": [{"source": ids[s], "target": ids[t], "weight": w} for s, t, w in ends],
    }


def write_graph(path: str | Path, whole: AttributionGraph, pruned: Graph | None = None, **given: Any) -> Path:
    """Write a graph file that keeps the schema; `given` is that of `graph_data`.

    Raises:
        Refused: the file would be larger than Neuronpedia takes.
    """
    data = graph_data(whole, pruned, **given)
    _check(data, path)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    if len(text.encode()) > _LARGEST:
        why = f"it would have {len(text.encode()) >> 20} MiB, and Neuronpedia takes 100"
        raise Refused(f"file {str(path)!r}", why, ("prune more: ", Keyword("nodes", 0.6), ", ", Keyword("edges", 0.8)))
    return write_text(path, text)


def read_graph(path: str | Path) -> Graph:
    """Read a graph file: its nodes, edges, influences, activations and supernodes; labels stand in the record.

    Supernodes keep the nodes that the file has: viewers leave others in them when they prune.

    Raises:
        Refused: not JSON, not of the schema, ids that are there twice, links between nodes that are not there, or a
            node in two supernodes.
    """
    data = read_json(path)
    _check(data, path)
    nodes = _nodes(data, path)
    links = [(link["source"], link["target"]) for link in data["links"]]
    if loose := [end for pair in links for end in pair if end not in nodes]:
        raise Refused(f"file {str(path)!r}", f"a link ends at {loose[0][:60]!r}, which is no node", "export it again")
    entries = {e["node_id"]: e for e in data["nodes"]}
    titled = (_FEATURE, _LOGIT)  # tokens head the columns of a picture
    numbers = {"cumulative": "influence", "activation": "activation", "share": "token_prob"}
    made = graph(
        [Edge(nodes[s], nodes[t]) for s, t in links],
        torch.tensor([float(link["weight"]) for link in data["links"]]),
        nodes=list(nodes.values()),
        attributes={n: torch.tensor([float(e.get(k) or 0.0) for e in entries.values()]) for n, k in numbers.items()},
        titles=[e["clerp"] if e["feature_type"] in titled else "" for e in entries.values()],
        groups=_groups(data, path),
        words=data["metadata"]["prompt_tokens"],
        unit="of its value",
    )
    labels = {str(nodes[i]): e["clerp"] for i, e in entries.items() if e["clerp"]}
    about = data["metadata"]
    record = {"prompt": about["prompt"], "scan": about["scan"], "labels": labels, "queries": data["qParams"]}
    return replace(made, reasons={"weight": "one prompt"}, record=record)


def _groups(data: dict[str, Any], path: str | Path) -> tuple[str, ...]:
    """Return the supernode of each node of a file, "" for none; nothing if it has no supernodes."""
    held: dict[str, str] = {}
    for name, *ids in (row for row in data["qParams"].get("supernodes", []) if row):
        for i in ids:
            if held.setdefault(i, name) != name:
                why = f"the node {i[:60]!r} is in the supernodes {held[i][:40]!r} and {name[:40]!r}"
                raise Refused(f"file {str(path)!r}", why, "leave it in one of them")
    return tuple(held.get(e["node_id"], "") for e in data["nodes"]) if held else ()


def _nodes(data: dict[str, Any], path: str | Path) -> dict[str, Node]:
    """Return the node of every id.

    Raises:
        Refused: an id that is there twice, a node with two ids, or a kind of node that graphs here do not have.
    """
    found: dict[str, Node] = {}
    what, length = f"file {str(path)!r}", len(data["metadata"]["prompt_tokens"])
    for entry in data["nodes"]:
        name = entry["node_id"]
        if name in found:
            why = f"the id {name[:60]!r} is there twice, so that its links could mean either"
            raise Refused(what, why, "export it with unique ids (errors as LAYER_error_mlp_POSITION)")
        if not 0 <= entry["ctx_idx"] < length:
            why = f"the node {name[:60]!r} stands at position {entry['ctx_idx']} of {length}"
            raise Refused(what, why, "export it again")
        try:
            found[name] = _node(entry)
        except (ValueError, IndexError):
            why = f"the node {name[:60]!r} of type {entry['feature_type'][:40]!r} cannot be read"
            raise Refused(what, why, "export graphs of MLPs: features, errors, tokens and logits") from None
    if len(set(found.values())) < len(found):
        twice = next(n for n in found.values() if list(found.values()).count(n) > 1)
        raise Refused(what, f"two of its ids mean {twice}", "export it with one entry for each node")
    return found


def _node(entry: Mapping[str, Any]) -> Node:
    """Return the node of an entry.

    Raises:
        ValueError, IndexError: an id or a type of node that is not known.
    """
    name, kind, position = entry["node_id"], entry["feature_type"], entry["ctx_idx"]
    parts = name.split("_")
    if kind == _FEATURE:
        made = neuron_node if entry.get("unit") == "neuron" else latent_node
        return made(_index(parts[0]), _index(parts[1]), position)
    if kind == _ERROR:
        layer = _index(parts[0] if "mlp" in parts else parts[1])
        return Others(layer, position) if "others" in parts else Error(layer, position)
    if kind == _TOKEN:
        return Address("pos_embed" if parts[0] == "P" else "embed", position=position)
    if kind == _LOGIT:
        return Logit(_index(parts[1]), position)
    raise ValueError(kind)


def _index(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(text)
    return int(text)


def _name(option: str, text: str) -> str:
    made = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")
    if not made:
        raise Refused(Keyword(option, text), "it has no letter or digit", "give a name such as norway")
    return made


def _check(data: Any, path: str | Path) -> None:
    fault = next(faults(data, graph_schema()), None)
    if fault is not None:
        raise Refused(f"file {str(path)!r}", fault, "give a graph file of circuit-tracer or Neuronpedia")
