"""Supernodes: groups of a graph's units that a reader takes for one thing, suggested, named and kept in a file.

Two units at one position are alike by √(cos⁺ · co): `cos` is the cosine of what they write, `co` that of their
activations over the tokens of all prompts given. Average linkage joins the most alike until the similarity that is
asked for; units that nothing joins stay alone. Names say what a group writes or reads, and are there to be edited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.files import read_json, write_json
from cutaway.core.node import Latent
from cutaway.core.refuse import Refused
from cutaway.features.effects import logit_effects
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.influence import sources, spread
from cutaway.graphs.trace import Run
from cutaway.graphs.writes import writes
from cutaway.models.vocabulary import special_ids
from cutaway.views.wording import visible

FORMAT, VERSION = "cutaway supernodes", 1
_SHAPE = '{"format": "cutaway supernodes", "version": 1, "graph": {…}, "supernodes": [{"name": …, "nodes": […]}]}'
_RANDOM = 20  # directions that a group's largest effect on a logit is held against


@dataclass(frozen=True)
class Supernodes:
    """Named groups of nodes of one graph.

    Attributes:
        groups: the nodes of each group, by its name.
        graph: which graph they are of: the token ids of its prompt, and hashes of model and units.
    """

    groups: Mapping[str, tuple[str, ...]]
    graph: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write them as JSON, to be edited by hand."""
        rows = [{"name": name, "nodes": list(nodes)} for name, nodes in self.groups.items()]
        return write_json(path, {"format": FORMAT, "version": VERSION, "graph": dict(self.graph), "supernodes": rows})

    def of_nodes(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Return the group of each node, "" for none."""
        at = {node: name for name, members in self.groups.items() for node in members}
        return tuple(at.get(node, "") for node in nodes)

    def check(self, whole: AttributionGraph, what: str = "supernodes") -> None:
        """Refuse groups of another graph, unknown nodes, and nodes that are no units or stand in two groups.

        Raises:
            Refused: any of these.
        """
        ours = identity(whole)
        for name in ours.keys() & self.graph.keys():
            if ours[name] != self.graph[name]:
                why = (
                    f"they are of another graph: its {name} is {str(self.graph[name])[:80]}, not {str(ours[name])[:80]}"
                )
                raise Refused(what, why, "group the nodes of this graph")
        kinds = dict(zip(whole.labels["node"], whole.kinds["unit"].tolist(), strict=True))
        held = dict[str, str]()
        for name, nodes in self.groups.items():
            for node in nodes:
                if not kinds.get(node, False):
                    why = f"{node!r} of {name!r} is " + ("no unit" if node in kinds else "no node of the graph")
                    raise Refused(what, why, "name features or neurons of the graph, with their positions")
                if node in held:
                    raise Refused(what, f"{node} is in {held[node]!r} and in {name!r}", "leave it in one of them")
                held[node] = name


def read_supernodes(path: str | Path) -> Supernodes:
    """Read a file of supernodes.

    Raises:
        Refused: another file, a version that is not known, a name that is there twice, or an empty group.
    """
    data, what = read_json(path), f"file {str(path)!r}"
    try:
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ValueError
        rows = [(str(row["name"]), tuple(map(str, row["nodes"]))) for row in data["supernodes"]]
        graph = dict(data["graph"])
    except (KeyError, TypeError, ValueError):
        raise Refused(what, "it holds no supernodes of a version that is known", f"write {_SHAPE}") from None
    names = [name for name, _ in rows]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise Refused(what, f"the name {twice!r} is there twice", "give each group its own name")
    if empty := next((name for name, nodes in rows if not nodes or not name), None):
        raise Refused(what, f"the group {empty!r} has no nodes, or no name", "leave it out")
    return Supernodes(dict(rows), graph)


def identity(whole: AttributionGraph) -> dict[str, Any]:
    """Say which graph it is: the token ids of the prompt and, where its record has them, the model and the units."""
    subjects = whole.record.get("subjects", {})
    known = {"model": subjects.get("model", {}).get("weights"), "units": subjects.get("transcoders", {}).get("hash")}
    known |= {"units": "neurons"} if "neurons" in subjects else {}
    return {"ids": list(whole.ids)} | {name: value for name, value in known.items() if value}


@torch.no_grad()
def suggest(runs: Sequence[Run], whole: AttributionGraph, chosen: Int[Tensor, "unit"], similarity: float) -> Supernodes:
    """Group the units of a graph that are alike, and name the groups.

    Args:
        runs: the runs of all prompts, that of the graph first.
        whole: the graph.
        chosen: the units that are grouped.
        similarity: the mean similarity, from 0 to 1, down to which two groups are joined.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    nodes = [n for i in chosen.tolist() if isinstance(n := whole.nodes[i], Latent | Address)]
    if len(nodes) < 2:
        return Supernodes({}, identity(whole))
    alike = likeness(runs, nodes)
    apart = (1 - alike)[np.triu_indices(len(nodes), 1)]
    joined = fcluster(linkage(apart, "average"), 1 - similarity, "distance")
    groups = [chosen[torch.from_numpy(joined == one)] for one in dict.fromkeys(joined.tolist())]
    groups = [members for members in groups if len(members) > 1]
    names = _distinct(_names(runs[0], whole, groups)) if groups else []
    members = [tuple(whole.labels["node"][i] for i in one.tolist()) for one in groups]
    return Supernodes(dict(zip(names, members, strict=True)), identity(whole))


def likeness(runs: Sequence[Run], nodes: Sequence[Latent | Address]) -> np.ndarray:
    """Return how alike each two units are, [unit unit]; units at different positions are not."""
    active = torch.nn.functional.normalize(_activations(runs, nodes), dim=1)
    at, alike = torch.tensor([node.position for node in nodes]), torch.zeros(len(nodes), len(nodes))
    for position in at.unique():
        own = (at == position).nonzero()[:, 0]
        written = torch.stack([_written(runs[0], nodes[i]) for i in own.tolist()]).float()
        written = torch.nn.functional.normalize(written, dim=1)
        together = active[own] @ active[own].T
        alike[own[:, None], own] = ((written @ written.T).cpu().clamp(0, 1) * together.clamp(0, 1)).sqrt()
    return alike.double().numpy()


def _written(run: Run, node: Latent | Address) -> Float[Tensor, "site_d_model"]:
    """Return what a unit writes at every layer, end to end."""
    out = torch.zeros(run.frozen.layers, run.frozen.model.shape.d_model).to(run.targets.vector)
    for place, vector in writes(run, node):
        out[place.layer] += vector
    return out.flatten()


def _activations(runs: Sequence[Run], nodes: Sequence[Latent | Address]) -> Float[Tensor, "unit token"]:
    """Return the units' activations on all tokens of all runs."""
    rows = {key: i for i, key in enumerate(dict.fromkeys(map(unit_of, nodes)))}
    starts = np.cumsum([0, *(run.frozen.width for run in runs)])
    out = torch.zeros(len(rows), int(starts[-1]))
    for run, start in zip(runs, starts, strict=False):
        t = run.units.table
        for key, position, value in zip(_keys(run), t.position.tolist(), t.activation.tolist(), strict=True):
            if key in rows:
                out[rows[key], int(start) + position] = value
    return out[[rows[unit_of(node)] for node in nodes]]


def unit_of(node: Latent | Address) -> tuple[int, int]:
    """Return the layer and the number of a unit."""
    return (node.block, node.index) if isinstance(node, Latent) else (node.layer or 0, node.unit or 0)


def _keys(run: Run) -> list[tuple[int, int]]:
    return list(zip(run.units.table.layer.tolist(), run.units.table.index.tolist(), strict=True))


def _names(run: Run, whole: AttributionGraph, groups: Sequence[Int[Tensor, "unit"]]) -> list[str]:
    """Return what groups are about: the token of the most influence on each, and the one whose logit it raises most,
    if no random direction raises one as far.
    """
    model, g = run.frozen.model, torch.Generator().manual_seed(0)
    own = torch.stack([_sum_written(run, whole, members) for members in groups])
    effects = logit_effects(model, torch.cat([own, torch.randn(_RANDOM, own.shape[1], generator=g).to(own)]))
    effects[:, sorted(special_ids(model.tokenizer))] = -torch.inf
    raised = effects.max(1)
    said, chance = model.text.token_texts(raised.indices[: len(groups)]), float(raised.values[len(groups) :].max())
    start = torch.zeros(len(groups), len(whole.share)).to(whole.weight)
    row = {int(node): r for r, node in enumerate(whole.node_of.tolist())}
    for one, members in zip(start, groups, strict=True):
        one[[row[i] for i in members.tolist()]] = whole.influence[members]
    found = spread(whole.weight, whole.node_of, whole.level, start, sources(whole.kinds))
    tokens = [whole.nodes[i].position or 0 for i in (found * whole.kinds["token"]).argmax(1).tolist()]
    names = [_quoted(whole.words[position]) for position in tokens]
    beyond = (raised.values[: len(groups)] > chance).tolist()
    return [f"{n} → {_quoted(t)}" if yes else n for n, t, yes in zip(names, said, beyond, strict=True)]


def _sum_written(run: Run, whole: AttributionGraph, members: Int[Tensor, "unit"]) -> Float[Tensor, "d_model"]:
    """Return what the units of a group write together."""
    units = [n for i in members.tolist() if isinstance(n := whole.nodes[i], Latent | Address)]
    return torch.stack([_written(run, n).view(run.frozen.layers, -1) for n in units]).sum((0, 1)).float()


def _quoted(word: str) -> str:
    return f"“{visible(word.strip() or word)}”"


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, those that stand there twice with a number."""
    return [n if n not in names[:i] else f"{n} {names[:i].count(n) + 1}" for i, n in enumerate(names)]
