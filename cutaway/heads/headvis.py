"""HeadVis trees: folders of JSON files with the page of every head, as github.com/anthropics/headvis defines them.

    config.json                  names, sizes, the heads that are there, and what is to be shown
    scatter_data.json            a row a head: layer, head, and its metrics
    heads/L{layer}H{head}.json   sequences by interval of their largest attention, histograms, tokens, statistics
    server_config.json           {}: nothing is computed while it is looked at
    attributions/manifest.json   {}

Attention is sparse: `attention_indices` are query · length + key. Entries that this module does not know are kept.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.files import new_folder, read_json, write_text
from cutaway.core.refuse import Refused
from cutaway.core.result import Result

PATTERN = "L{layer}H{head}.json"
#: metrics that Neuronpedia shows: unit, and the description in the file
METRICS = {
    "self_attention_score": ("attention", "Mean attention of a query to itself."),
    "prev_token_score": ("attention", "Mean attention of a query to the token before it."),
    "pattern_entropy": ("nats", "Mean Shannon entropy of the attention of a query."),
    "qk_distance": ("tokens", "Mean distance of query and key, weighted by attention."),
    "qk_distance_variance": ("tokens²", "Variance of the distance of query and key, weighted by attention."),
    "induction_score": ("attention", "Mean attention to what followed earlier occurrences of the query's token."),
}
_AGAIN = "write the tree again"


@dataclass(frozen=True, kw_only=True)
class HeadMetrics(Result, kind="head_metrics"):
    """Metrics of heads as a HeadVis tree has them; NaN for heads that it leaves out.

    Attributes:
        value: the metrics, each with its own unit.
    """

    value: Float[Tensor, "metric layer head"]


@dataclass(frozen=True)
class Sample:
    """A sequence with the largest attention of one head.

    Attributes:
        sequence: the number of the sequence in its data.
        interval: rank of its strength, from 1; the last are the strongest.
        tokens: its tokens as text.
        pattern: attention, 0 where the file leaves it out.
        strength: the largest attention but for the first query and the first key; None where the file has none.
    """

    sequence: int
    interval: int
    tokens: tuple[str, ...]
    pattern: Float[Tensor, "q_pos k_pos"]
    strength: float | None


@dataclass(frozen=True)
class HeadTree:
    """A HeadVis tree on disk. Pages of heads are read when they are asked for.

    Attributes:
        folder: the folder.
        config: what `config.json` holds.
        rows: what `scatter_data.json` holds, a row a head.
        heads: layer and number of the heads that have a page.
        server: what `server_config.json` holds; empty without the file.
        attributions: what `attributions/manifest.json` holds; empty without the file.
    """

    folder: Path
    config: dict[str, Any] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    heads: tuple[tuple[int, int], ...]
    server: dict[str, Any]
    attributions: dict[str, Any]

    def page(self, layer: int, head: int) -> dict[str, Any]:
        """Return what the file of one head holds.

        Raises:
            Refused: the tree has no such head, or its file is damaged.
        """
        if (layer, head) not in self.heads:
            have = ", ".join(f"{i}.{h}" for i, h in self.heads[:8])
            raise Refused(f"head {layer}.{head} of {str(self.folder)!r}", f"the tree has heads {have} …", "ask for one")
        path = self.folder / "heads" / _file(self.config, layer, head)
        return _checked_page(path, read_json(path), self.config["n_intervals"])

    def samples(self, layer: int, head: int) -> list[Sample]:
        """Return the sequences of one head, as the file orders them.

        Raises:
            Refused: the tree has no such head, or its file is damaged.
        """
        return [_sample(one) for one in self.page(layer, head)["sequences"]]

    def metrics(self) -> HeadMetrics:
        """Return the metrics of all heads."""
        names = list(self.config["metrics"])
        value = torch.full((len(names), self.config["n_layers"], self.config["n_heads"]), math.nan)
        for row in self.rows:
            numbers = [math.nan if row.get(name) is None else row[name] for name in names]
            value[:, row["layer"], row["head"]] = torch.tensor(numbers)
        return HeadMetrics(
            value=value,
            labels={"metric": names},
            units={name: METRICS[name][0] for name in names if name in METRICS},
            reasons={"value": "a HeadVis tree has no intervals and no controls"},
            record={"model": self.config.get("model_name"), "folder": str(self.folder)},
        )


def write_tree(
    folder: str | Path,
    config: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    pages: Iterable[tuple[tuple[int, int], Mapping[str, Any]]],
    server: Mapping[str, Any] | None = None,
    attributions: Mapping[str, Any] | None = None,
) -> HeadTree:
    """Write a tree, page by page, and return it as it is read.

    Raises:
        Refused: the folder is not empty, or these are not the parts of a HeadVis tree.
    """
    folder = new_folder(folder)
    config, rows = _checked_config(folder / "config.json", dict(config)), [dict(row) for row in rows]
    _check_rows(folder / "scatter_data.json", rows, config)
    for (layer, head), page in pages:
        path = folder / "heads" / _file(config, layer, head)
        _write(path, _checked_page(path, page, config["n_intervals"]))
    _write(folder / "scatter_data.json", rows)
    _write(folder / "server_config.json", dict(server or {}))
    _write(folder / "attributions" / "manifest.json", dict(attributions or {}))
    _write(folder / "config.json", config, indent=2)  # last: a tree without it was not finished
    return read_headvis(folder)


def read_headvis(folder: str | Path) -> HeadTree:
    """Open a HeadVis tree.

    Raises:
        Refused: no such folder, a file that is missing or damaged, or a page that is not there.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise Refused(f"HeadVis tree {str(folder)!r}", "it has no config.json", "give the folder that holds it")
    config = _checked_config(folder / "config.json", read_json(folder / "config.json"))
    rows = read_json(folder / "scatter_data.json")
    _check_rows(folder / "scatter_data.json", rows, config)
    heads = tuple((layer, head) for layer, head in config["heads"])
    for layer, head in heads:
        path = folder / "heads" / _file(config, layer, head)
        if not path.is_file():
            raise Refused(f"file {str(path)!r}", f"config.json lists head {layer}.{head}, and it is missing", _AGAIN)
    more = (folder / "server_config.json", folder / "attributions" / "manifest.json")
    server, attributions = (read_json(path) if path.is_file() else {} for path in more)
    for path, held in zip(more, (server, attributions), strict=True):
        _need(path, isinstance(held, dict), "it is no object")
    return HeadTree(folder, config, rows, heads, server, attributions)


def histogram(edges: Iterable[float], values: Iterable[float]) -> dict[str, list[float]]:
    """Return a histogram as the format has them."""
    return {"bin_edges": list(edges), "bin_values": list(values)}


def _write(path: Path, data: Any, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(data, indent=indent, allow_nan=False) + "\n")


def _need(path: Path, right: bool, why: str) -> None:
    if not right:
        raise Refused(f"file {str(path)!r}", why, _AGAIN)


def _whole(x: Any, below: int | None = None, least: int = 0) -> bool:
    return type(x) is int and x >= least and (below is None or x < below)


def _number(x: Any) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


def _file(config: Mapping[str, Any], layer: int, head: int) -> str:
    return config["head_data_pattern"].format(layer=layer, head=head)


def _checked_config(path: Path, config: Any) -> dict[str, Any]:
    _need(path, isinstance(config, dict), "it is no object")
    for name in ("n_layers", "n_heads", "n_intervals"):
        _need(
            path, _whole(config.get(name), least=1), f"{name!r} is {config.get(name)!r:.60}, which is no number of any"
        )
    names: Any = config.get("metrics")
    texts = isinstance(names, list) and all(isinstance(n, str) for n in names) and len(set(names)) == len(names)
    _need(path, texts, f"'metrics' is {names!r:.60}, which is no list of different names")
    heads: Any = config.get("heads")
    sizes = config["n_layers"], config["n_heads"]
    _need(path, isinstance(heads, list) and len(heads) > 0, "it lists no heads")
    for one in heads:
        pair = isinstance(one, list | tuple) and len(one) == 2 and all(map(_whole, one, sizes))
        _need(path, pair, f"{one!r:.60} is no head of {sizes[0]} layers of {sizes[1]} heads")
    _need(path, len({tuple(one) for one in heads}) == len(heads), "it lists a head twice")
    pattern: Any = config.get("head_data_pattern", PATTERN)
    _need(path, isinstance(pattern, str) and _is_pattern(pattern), f"{pattern!r:.60} names no file of a head")
    return config | {"head_data_pattern": pattern, "heads": [list(one) for one in heads]}


def _is_pattern(pattern: str) -> bool:
    """Return True if a pattern has layer and head in it, and its files lie in their folder."""
    try:
        parts = [(name, spec or conversion) for _, name, spec, conversion in string.Formatter().parse(pattern) if name]
    except ValueError:
        return False
    plain = sorted(parts) in ([("head", None), ("layer", None)], [("head", ""), ("layer", "")])
    return plain and not set("/\\:") & set(pattern)


def _check_rows(path: Path, rows: Any, config: Mapping[str, Any]) -> None:
    _need(path, isinstance(rows, list), "it is no list")
    sizes, seen = (config["n_layers"], config["n_heads"]), set[tuple[int, int]]()
    for row in rows:
        at = isinstance(row, dict) and all(map(_whole, (row.get("layer"), row.get("head")), sizes))
        _need(path, at, f"{row!r:.60} is no row of a head of {sizes[0]} layers of {sizes[1]} heads")
        for name in config["metrics"]:
            given = row.get(name)
            _need(path, given is None or _number(given), f"{name!r} is {given!r:.60}, which is no number")
        _need(path, (row["layer"], row["head"]) not in seen, f"head {row['layer']}.{row['head']} has two rows")
        seen.add((row["layer"], row["head"]))


def _checked_page(path: Path, page: Any, intervals: int) -> dict[str, Any]:
    _need(path, isinstance(page, Mapping) and isinstance(page.get("sequences"), list), "it holds no sequences")
    for one in page["sequences"]:
        _check_sequence(path, one, intervals)
    for name in ("qk_distance_histogram", "histogram"):
        _need(
            path, _is_histogram(page.get(name, {})), f"{name!r} is no histogram: bin_edges are one more than bin_values"
        )
    for name in ("top_query_tokens", "top_key_tokens"):
        table = page.get(name, [])
        right = isinstance(table, list) and all(
            isinstance(x, dict) and isinstance(x.get("token"), str) and _number(x.get("weight")) for x in table
        )
        _need(path, right, f"{name!r} is no list of tokens with weights")
    _need(path, isinstance(page.get("statistics", {}), dict), "'statistics' is no object")
    return dict(page)


def _is_histogram(x: Any) -> bool:
    if not isinstance(x, dict):
        return False
    edges, values = x.get("bin_edges", []), x.get("bin_values", [])
    if not isinstance(edges, list) or not isinstance(values, list) or not all(map(_number, [*edges, *values])):
        return False
    return (not edges and not values) or (len(edges) == len(values) + 1 and edges == sorted(edges))


def _check_sequence(path: Path, one: Any, intervals: int) -> None:
    _need(path, isinstance(one, dict) and _whole(one.get("sequence_id")), "a sequence has no 'sequence_id'")
    named = f"sequence {one['sequence_id']}"
    tokens: Any = one.get("tokens")
    length: Any = one.get("seq_len")
    texts = isinstance(tokens, list) and all(isinstance(t, str) for t in tokens)
    _need(path, texts and _whole(length, least=1) and len(tokens) == length, f"{named}: 'tokens' are not its 'seq_len'")
    right = _whole(one.get("interval"), intervals + 1, 1)
    _need(path, right, f"{named}: 'interval' is {one.get('interval')!r:.60}, which is none of 1 to {intervals}")
    at: Any = one.get("attention_indices")
    values: Any = one.get("attention_values")
    _need(path, isinstance(at, list) and isinstance(values, list), f"{named}: it has no attention")
    _need(path, len(at) == len(values), f"{named}: {len(at)} indices with {len(values)} values")
    inside = all(_whole(i, length**2) for i in at) and len(set(at)) == len(at)
    _need(path, inside, f"{named}: indices are not different ones below {length}²")
    _need(path, all(_number(v) and 0 <= v <= 1.01 for v in values), f"{named}: values are no shares of attention")
    top = one.get("max_activation")
    _need(path, top is None or _number(top), f"{named}: 'max_activation' is {top!r:.60}, which is no number")


def _sample(one: Mapping[str, Any]) -> Sample:
    n = one["seq_len"]
    pattern = torch.zeros(n * n)
    pattern[torch.tensor(one["attention_indices"], dtype=torch.long)] = torch.tensor(one["attention_values"])
    named = one["sequence_id"], one["interval"], tuple(one["tokens"])
    return Sample(*named, pattern.reshape(n, n), one.get("max_activation"))
