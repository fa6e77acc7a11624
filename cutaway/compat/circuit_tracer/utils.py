"""Files of graphs, features in the addresses of graphs, and the tables of circuit-tracer's demonstrations."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlparse

import torch
from torch import Tensor

from cutaway.compat.circuit_tracer.graph import Graph, pruned
from cutaway.compat.circuitsvis.render import RenderedHTML, shown
from cutaway.core.files import read_json, write_text
from cutaway.core.refuse import Keyword, Refused
from cutaway.graphs.neuronpedia import graph_data, read_graph
from cutaway.models.anatomy.weights import unembed_rows
from cutaway.views.page import Section, Show, report


class Feature(NamedTuple):
    """A feature at a position."""

    layer: int
    pos: int
    feature_idx: int


def get_default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def create_graph_files(
    graph_or_path: Any,
    slug: str,
    output_path: Any,
    scan: Any = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
) -> None:
    """Prune a graph, and write it into a folder, with a page that draws all graphs there.

    Raises:
        Refused: neither the graph nor the call names the transcoders.
    """
    from transformers import AutoTokenizer

    graph = graph_or_path if isinstance(graph_or_path, Graph) else Graph.from_pt(graph_or_path)
    folder = Path(output_path)
    if (scan := scan or graph.scan) is None:
        raise Refused(Keyword("scan", None), "the graph does not say which transcoders it is of", "give their name")
    tokenizer = AutoTokenizer.from_pretrained(graph.cfg.tokenizer_name)
    whole = replace(graph.house, words=tuple(tokenizer.decode([i]) for i in graph.input_tokens.tolist()))
    data = graph_data(whole, pruned(graph, node_threshold, edge_threshold), slug=slug, scan=scan)
    write_text(folder / f"{slug}.json", json.dumps(data, indent=2, ensure_ascii=False))
    index = folder / "graph-metadata.json"
    rows = [row for row in (read_json(index)["graphs"] if index.exists() else []) if row["slug"] != slug]
    write_text(index, json.dumps({"graphs": [*rows, data["metadata"]]}, indent=2))
    graphs = {file.stem: read_graph(file) for file in sorted(folder.glob("*.json")) if file != index}
    sections = [Section(name, g.record["prompt"], shows=[Show(g)]) for name, g in graphs.items()]
    report("Attribution graphs", sections, folder / "index.html")


def decode_url_features(url: str) -> tuple[dict[str, list[Feature]], list[Feature]]:
    """Return the supernodes and the pinned features in the address of a graph; embeddings have layer −1."""
    query, groups = parse_qs(urlparse(url).query), dict[str, list[Feature]]()
    for name, *ids in json.loads(query.get("supernodes", ["[]"])[0]):
        same = sum(key == name or key.startswith(f"{name} (") for key in groups)
        groups[f"{name} ({same + 1})" if same else name] = [_feature(i) for i in ids]
    return groups, [_feature(i) for i in query.get("pinnedIds", [""])[0].split(",") if i]


def extract_supernode_features(url: str) -> dict[str, list[Feature]]:
    """Return the supernodes in the address of a graph."""
    return decode_url_features(url)[0]


def _feature(text: str) -> Feature:
    layer, index, position = (-1 if part == "E" else int(part) for part in text.split("_"))
    return Feature(layer, position, index)


def get_unembed_vecs(model: Any, token_ids: Sequence[int], backend: str = "transformerlens") -> list[Tensor]:
    """Return the rows of the unembedding."""
    return list(unembed_rows(model.house.anatomy, torch.as_tensor(token_ids, device=model.house.device))[0])


def get_top_features(graph: Graph, n: int = 10) -> tuple[list[tuple[int, int, int]], list[float]]:
    """Return the features of the largest influence."""
    top = graph.house.influence[: len(graph.selected_features)].topk(min(n, len(graph.selected_features)))
    rows = graph.active_features[graph.selected_features[top.indices]].tolist()
    return [(layer, position, index) for layer, position, index in rows], top.values.tolist()


def get_topk(logits: Tensor, tokenizer: Any, k: int = 5) -> list[tuple[str, float]]:
    """Return the likeliest next tokens."""
    top = logits.squeeze()[-1].float().softmax(-1).topk(k)
    return [(tokenizer.decode([i]), p) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def cleanup_cuda() -> None:
    """Free what no one uses."""
    gc.collect()
    torch.cuda.empty_cache()


def _show(*tables: tuple[str, Mapping[str, float]]) -> None:
    """Draw named numbers as bars, where IPython is there to show them."""
    if find_spec("IPython"):
        from IPython.display import display  # type: ignore[import-not-found]

        display(RenderedHTML(*(shown(list(row.values()), {"component": list(row)}, title) for title, row in tables)))


def display_topk_token_predictions(
    sentence: str, original_logits: Tensor, new_logits: Tensor, tokenizer: Any, k: int = 5, key_tokens: Any = None
) -> None:
    """Draw the likeliest next tokens before and after an intervention, and some tokens of interest."""
    for name, logits in (("original", original_logits), ("new", new_logits)):
        _show((f"{sentence}: {name}", dict(get_topk(logits, tokenizer, k))))
        if key_tokens:
            labels, ids = zip(*key_tokens, strict=True)
            display_token_probs(logits, list(ids), labels, f"key tokens, {name}")


def display_token_probs(logits: Tensor, token_ids: Any, labels: Sequence[str], title: str = "") -> None:
    """Draw the probabilities of tokens."""
    _show((title, dict(zip(labels, logits.squeeze(0)[-1].float().softmax(-1)[token_ids].tolist(), strict=True))))


def display_top_features_comparison(feature_sets: Any, scores_sets: Any = None, **links: Any) -> None:
    """Draw the features of several graphs with their scores."""
    for name, rows in feature_sets.items():
        _show((name, dict(zip(map(str, rows), scores_sets[name] if scores_sets else [1.0] * len(rows), strict=True))))


def display_attribution_config(token_pairs: Any, target_pairs: Any) -> None:
    """Draw the ids of tokens, and the weights of targets."""
    _show(
        ("token id", dict(token_pairs)),
        ("weight", {f"{kind}: {one.token_str}": one.prob for kind, one in target_pairs}),
    )


def display_ablation_chart(groups: Any, logit_diffs: Any = None, title: str = "", colors: Any = None) -> None:
    """Draw probabilities by group, and differences of logits."""
    _show((title, {f"{group}, {token}": p for group, row in groups.items() for token, p in row.items()}))
    _show(("logit difference", logit_diffs or {}))


def display_generations_comparison(original_text: str, pre: Sequence[str], post: Sequence[str]) -> None:
    """Draw the continuations of a prompt without and with an intervention."""
    named = (("before", pre), ("after", post))
    _show(("continuation", {f"{name}: {text}": 1.0 for name, texts in named for text in texts}))
