"""Attribution graphs that must equal circuit-tracer's: features, edges, targets, influence, scores, pruning.

Seeded random models of three layers with norms and biases that are not the identity, and random transcoders in
circuit-tracer's own format, written by cutaway and read by both. One prompt of 12 tokens, the first a beginning of
text; all active features are nodes. A value is the largest difference to circuit-tracer on the same files, in float32,
as a share of the largest such value; its bar is 1e-5, and 0 of what is counted. Its raw graph (`.pt`) is read by
`graphs.circuit_tracer.read_raw_graph`, which must give the same graph and scores as its own functions.

Three conventions differ, and are mapped before the comparison. cutaway's columns of constants (biases, and MLPs at the
first position) have no counterpart there, and are no part of influences here. Position embeddings are sources here and
left out there, so that they are left out of influences, scores and pruning of GPT-2's shape. A skip of a transcoder at
the first position is part of a constant here and a path to the first token there, so that edges from the first token
are left out on both sides where transcoders have skips.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import parity
from bench.frame import Row, Subject, finish, options, pythons, serve

if TYPE_CHECKING:
    from cutaway.graphs.attribution_graph import AttributionGraph

BAR = 1e-5
LATENTS, WIDTH = 96, 12  # of each transcoder; tokens of the prompt
LEFT_OUT = {"GPT-2": "pos_embed@", "skip": "embed@0"}  # by shape or kind of transcoder, how such nodes begin


@dataclass(frozen=True)
class Case:
    """A shape of `bench.parity`, or Gemma 2's, and a kind of transcoder."""

    shape: str
    kind: str

    @property
    def left_out(self) -> str | None:
        """How the names of nodes begin that only one tool has."""
        return LEFT_OUT.get(self.kind, LEFT_OUT.get(self.shape))


CASES = {
    "GPT-2": Case("GPT-2", "relu"),
    "GPT-2, cross-layer": Case("GPT-2", "cross-layer"),
    "Llama, skips and thresholds": Case("Llama, grouped heads", "skip"),
    "Pythia": Case("Pythia", "relu"),
    "Gemma 2, thresholds": Case("Gemma 2", "thresholds"),
}
WORK = {
    "features": "active features that only one has",
    "targets": "logits that only one has",
    "activation": "activations",
    "share": "probabilities of the targets",
    "from units": "edges from features",
    "from errors": "edges from errors",
    "from tokens": "edges from tokens",
    "influence": "influence of all nodes",
    "scores": "replacement and completeness, as counted there",
    "kept nodes": "nodes kept by pruning that only one keeps",
    "kept edges": "edges kept by pruning that only one keeps",
    "read scores": "the same of its raw file, read by cutaway",
}
COUNTED, FROM = ("features", "targets", "kept nodes", "kept edges"), ("unit", "error", "token")


def main() -> int:
    """Compare every case, and write a row a quantity."""
    from safetensors.torch import load_file

    parser = options(__doc__)
    chosen = parser.parse_args()
    python = pythons(chosen, {"circuit_tracer": "d"}).get("circuit_tracer")
    if python is None:
        parser.error("give the python of the peer's environment: --python-d")
    rows = list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        peer = Subject(python, "bench.graph_parity", "--subject", folder)
        for name in CASES:
            rows += compared(Path(folder), name, load_file(peer.ask(name=name)["file"]))
        peer.close()
    return finish("graph_parity", rows, write=not chosen.no_write, label=chosen.label)


def transcoders(kind: str, n_layers: int, width: int) -> Any:
    """Random transcoders of every MLP, a fifth of their latents active on a token."""
    import torch

    from cutaway.dictionaries.dictionary import Dictionary
    from cutaway.dictionaries.gates import JumpRelu, Relu
    from cutaway.dictionaries.parts import Block

    g = torch.Generator().manual_seed(2)

    def drawn(*shape: int, scale: float = 1.0) -> Any:
        return torch.randn(shape, generator=g) * scale / width**0.5

    ins, outs = ([f"{site}.{i}" for i in range(n_layers)] for site in ("mlp_in", "mlp_out"))
    writes = [outs[i:] if kind == "cross-layer" else outs[i : i + 1] for i in range(n_layers)]
    marked = kind in ("skip", "thresholds")
    return Dictionary(
        tuple(Block(LATENTS, (ins[i],), tuple(writes[i])) for i in range(n_layers)),
        tuple({ins[i]: drawn(LATENTS, width)} for i in range(n_layers)),
        tuple({w: drawn(LATENTS, width, scale=0.3) for w in writes[i]} for i in range(n_layers)),
        tuple(drawn(LATENTS, scale=1.0) - 0.3 for _ in range(n_layers)),
        {w: drawn(width, scale=0.3) for w in outs},
        tuple(JumpRelu(0.2 + drawn(LATENTS).abs(), signed=True) if marked else Relu() for _ in range(n_layers)),
        {(ins[i], outs[i]): drawn(width, width, scale=0.3) for i in range(n_layers)} if kind == "skip" else {},
    )


def save(folder: str) -> None:
    """Seeded random models, and transcoders in a folder of each case."""
    from cutaway.dictionaries.formats.circuit_tracer import write

    parity.save(folder, tuple(dict.fromkeys(case.shape for case in CASES.values())))
    for name, case in CASES.items():
        write(transcoders(case.kind, parity.LAYERS, parity.WIDTH), Path(folder, "transcoders", name))


def prompt() -> list[int]:
    """A beginning of text, and random tokens."""
    import torch

    drawn = torch.randperm(parity.WORDS - 1, generator=torch.Generator().manual_seed(1))
    return [parity.WORDS - 1, *drawn[: WIDTH - 1].tolist()]


# --- cutaway


def compared(folder: Path, name: str, theirs: dict[str, Any]) -> list[Row]:
    """The rows of one case, given the peer's numbers and its raw graph."""
    import torch

    import cutaway as ca
    from cutaway.graphs.circuit_tracer import read_raw_graph

    case = CASES[name]
    model, d = ca.load(folder / case.shape, check=False), ca.dictionaries.load(folder / "transcoders" / name)
    traced = ca.graphs.trace(model, ca.tasks.as_prompts(torch.tensor([prompt()])), d, samples=1)
    left = case.left_out
    found = gaps(without(traced, left), without(read_raw_graph(folder / f"{name}.pt"), left), theirs)
    rows = []
    for key, words in WORK.items():
        unit, bar = ("of them", 0.0) if key in COUNTED else ("of the largest", BAR)
        rows.append(Row(f"{name}: {words}", float(f"{found[key]:.2g}"), unit, bar))
    return rows


def without(graph: AttributionGraph, left_out: str | None) -> AttributionGraph:
    """Return a graph without the edges from nodes of such names, influences counted again."""
    import torch

    from cutaway.graphs.influence import graph_scores, sources, spread

    if left_out is None:
        return graph
    left = torch.tensor([name.startswith(left_out) for name in graph.labels["node"]])
    weight = graph.weight.masked_fill(left, 0.0)
    influence = spread(weight, graph.node_of, graph.level, graph.share[None], sources(graph.kinds))[0]
    scores = graph_scores(influence, weight, graph.node_of, graph.share, graph.kinds)
    return replace(graph, weight=weight, influence=influence, influence_null=None, excess=None, **scores)


def gaps(ours: AttributionGraph, read: AttributionGraph, theirs: dict[str, Any]) -> dict[str, float]:
    """Return how far each quantity is from the peer's, whose raw file `read` is, and `theirs` its own numbers."""
    import torch

    import cutaway as ca

    nodes, targets = read.labels["node"], read.labels["target"]
    place = {name: i for i, name in enumerate(ours.labels["node"])}
    columns = [place.get(name, -1) for name in nodes]  # −1: errors at the first position, which are zero there
    rows = [ours.labels["target"].index(name) for name in targets]

    def aligned(values: Any) -> Any:
        return torch.cat([values, torch.zeros_like(values[..., :1])], -1)[..., columns]

    weight, kinds = aligned(ours.weight[rows]), read.kinds
    found = {
        f"from {kind}s": gap(weight[:, mask], read.weight[:, mask]) for kind, mask in kinds.items() if kind in FROM
    }
    units = [{n for n in graph.labels["node"] if n.startswith("latent")} for graph in (ours, read)]
    kept = ca.graphs.prune(ours, "circuit-tracer")
    stays = {n for n, one in zip(nodes, theirs["kept nodes"].tolist(), strict=True) if one}
    edges = {(nodes[s], nodes[t]) for t, s in theirs["kept edges"].nonzero().tolist()}
    ends = ([kept.labels["node"][i] for i in at.tolist()] for at in (kept.source, kept.target))
    return found | {
        "features": len(units[0] ^ units[1]),
        "targets": len(set(ours.labels["target"]) ^ set(targets)),
        "activation": gap(aligned(ours.activation), read.activation),
        "share": gap(ours.share[rows], read.share),
        "influence": gap(aligned(ours.influence), theirs["influence"]),
        "scores": gap(torch.tensor(ours.scores("circuit-tracer")), theirs["scores"]),
        "read scores": gap(torch.tensor(read.scores("circuit-tracer")), theirs["scores"]),
        "kept nodes": len(set(kept.labels["node"]) & set(nodes) ^ stays),
        "kept edges": len(set(zip(*ends, strict=True)) ^ edges),
    }


def gap(ours: Any, theirs: Any) -> float:
    """Return the largest difference, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --- circuit-tracer


def circuit_tracer(folder: Path, name: str) -> dict[str, Any]:
    """Trace a case there, write its raw graph, and return what its own functions say of it."""
    import torch
    from circuit_tracer import attribute
    from circuit_tracer.graph import compute_graph_scores, compute_node_influence, prune_graph

    from bench.tracers import replacement_model

    case = CASES[name]
    model = replacement_model(folder / case.shape, folder / "transcoders" / name)
    graph = attribute(torch.tensor(prompt()), model, batch_size=64)
    graph.to_pt(str(folder / f"{name}.pt"))
    n, width = len(graph.selected_features), len(graph.input_tokens)
    if case.kind == "skip":
        graph.adjacency_matrix[:, n + model.cfg.n_layers * width] = 0.0  # the first token
    weights = torch.zeros(len(graph.adjacency_matrix))
    weights[-len(graph.logit_targets) :] = graph.logit_probabilities
    kept = prune_graph(graph)
    return {
        "influence": compute_node_influence(graph.adjacency_matrix, weights),
        "scores": torch.tensor(compute_graph_scores(graph)),
        "kept nodes": kept.node_mask,
        "kept edges": kept.edge_mask,
    }


def serve_subject(folder: str) -> None:
    """Serve the peer's numbers."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)

    def answer(name: str) -> dict[str, Any]:
        with contextlib.redirect_stdout(sys.stderr):
            found = {key: value.detach().contiguous() for key, value in circuit_tracer(Path(folder), name).items()}
        file = Path(folder, f"{name}.safetensors")
        save_file(found, file)
        return {"file": str(file)}

    serve({"version": version("circuit-tracer")}, answer)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(sys.argv[2])
    else:
        sys.exit(main())
