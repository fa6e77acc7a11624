"""A model's heads as a HeadVis tree: metrics of every head, and sequences from all over the range of their strength.

The strength of a sequence is the largest attention, the first query and the first key left out. Sequences are ranked by
it into equal intervals; the last shows the strongest, the others some at random. Two forwards: ranks first, then the
patterns of the sequences that are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Call, Refused
from cutaway.core.stats import generator
from cutaway.heads.headvis import METRICS, PATTERN, HeadTree, histogram, write_tree
from cutaway.models import circuits
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.models.watching import in_batches, watched
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.repeats import Repeats

_CELLS = 1 << 22  # most entries of one layer's patterns at once, unless one sequence has more
_BINS = 50
_BUCKETS = 13  # of distance, at least: 0, 1, 2–3, … 2048–4095
_TOKENS = 50  # tokens in a table
_LEAST = 0.01  # attention below this does not count as induction, as in Neuronpedia's pages
_SHOWN = {
    "custom_plots": [
        {"key": "qk_distance_histogram", "label": "Q-K distance"},
        {"key": "histogram", "label": "Activation distribution"},
    ],
    "custom_tables": [
        {"key": "top_query_tokens", "label": "Top query tokens"},
        {"key": "top_key_tokens", "label": "Top key tokens"},
    ],
    "statistics_display": {
        "n_samples": {"label": "Samples kept", "format": "default"},
        "mean_max_activation": {"label": "Mean max activation", "format": "default"},
    },
}
See = Callable[[int, int, Float[Tensor, "head q_pos k_pos"]], None]
Head = tuple[int, int]


def write_headvis(
    model: Model,
    prompts: Prompts | Repeats,
    folder: str | Path,
    *,
    heads: Sequence[str] = (),
    intervals: int = 10,
    shown: int = 3,
    strongest: int = 10,
    keys: int = 8,
    threshold: float = 0.005,
    seed: int = 0,
) -> HeadTree:
    """Write the HeadVis tree of a model's heads over texts.

    Args:
        model: the model.
        prompts: the texts.
        folder: a new folder.
        heads: these, as `layer.head` or `layer.*`; all if empty.
        intervals: how many intervals of strength.
        shown: how many sequences of an interval are shown, drawn at random.
        strongest: how many of the last interval, the strongest first.
        keys: the most keys of a query that are kept.
        threshold: attention below this is left out.
        seed: of the draws.

    Raises:
        Refused: no such head, an encoder, no sequence of two tokens, or a folder that is not empty.
    """
    if not model.family.causal:
        raise Refused(f"heads of {model.name}", "it is an encoder: its heads look ahead, too", "capture patterns")
    if min(intervals, shown, strongest, keys) < 1 or not 0 <= threshold < 1:
        asked = {"intervals": intervals, "shown": shown, "strongest": strongest, "keys": keys, "threshold": threshold}
        raise Refused(Call("write_headvis", asked), "nothing would be shown", "ask for 1 or more, and less than all")
    places = [(a.layer or 0, a.unit or 0) for a in circuits.heads(model, heads)]
    tokens = prompts.bind(model)
    rows = [i for i, n in enumerate(tokens.lengths.tolist()) if n > 1]
    if not rows:
        raise Refused("pages of heads", "no sequence has two tokens", "give longer ones")
    layers, whole = sorted({layer for layer, _ in places}), Totals(model, tokens, places)
    watch(model, tokens, rows, layers, whole.see)
    chosen = {at: _chosen(whole.strength[at], rows, intervals, shown, strongest, seed) for at in places}
    kept = dict[tuple[Head, int], tuple[np.ndarray, np.ndarray]]()

    def see(row: int, layer: int, a: Tensor) -> None:
        for at, wanted in chosen.items():
            if at[0] == layer and row in wanted:
                kept[at, row] = _sparse(a[at[1]], keys, threshold)

    watch(model, tokens, sorted({row for wanted in chosen.values() for row in wanted}), layers, see)
    config = _config(model, tokens, prompts, places, intervals) | _SHOWN
    pages = ((at, _page(model, tokens, whole, at, chosen[at], kept)) for at in places)
    return write_tree(folder, config, [whole.metrics(at) for at in places], pages)


def watch(model: Model, tokens: Tokens, rows: Sequence[int], layers: Sequence[int], see: See) -> None:
    """Run sequences, and show the patterns of each in each layer, without padding."""

    def shown(layer: int, some: Sequence[int], pattern: Tensor) -> Tensor:
        for b, row in enumerate(some):
            real = tokens.mask[row]
            see(row, layer, pattern[b].detach()[:, real][:, :, real].float().cpu())
        return pattern

    size = _CELLS // (model.shape.n_heads * tokens.ids.shape[1] ** 2)
    for group in in_batches(model, tokens.rows(list(rows)), size):
        some = [rows[i] for i in group]
        watched(model, tokens.rows(some), {Address("pattern", layer): partial(shown, layer, some) for layer in layers})


class Totals:
    """Sums over all sequences, head by head, that metrics and histograms are made of.

    Attributes:
        strength: the largest attention in every sequence, by head and row.
    """

    def __init__(self, model: Model, tokens: Tokens, places: Sequence[Head]):
        self.tokens, self.places = tokens, places
        self.strength = {at: dict[int, float]() for at in places}
        self._sums = {layer: torch.zeros(6, model.shape.n_heads, dtype=torch.float64) for layer, _ in places}
        self._numbers = {layer: [0, 0, 0] for layer, _ in places}
        self._known = dict[int, tuple[Tensor, Tensor]]()

    def see(self, row: int, layer: int, a: Float[Tensor, "head q_pos k_pos"]) -> None:
        """Add the patterns of one sequence in one layer."""
        n = a.shape[-1]
        if row not in self._known:
            ids, at = self.tokens.ids[row][self.tokens.mask[row]].cpu(), torch.arange(n)
            after = torch.zeros(n, n, dtype=torch.bool)
            after[:, 1:] = (ids[:, None] == ids)[:, :-1] & (at[:, None] >= at[1:])
            self._known = {row: (after, (at[:, None] - at).abs().double())}
        after, far = self._known[row]
        x = a.double()
        entropy = -torch.special.xlogy(x, x).sum((-1, -2))
        back = torch.where(a >= _LEAST, x, 0.0).mul(after).sum((-1, -2))
        sums = [x.diagonal(0, -2, -1).sum(-1), x.diagonal(-1, -2, -1).sum(-1), entropy]
        sums += [(x * far).sum((-1, -2)), (x * far.square()).sum((-1, -2)), back]
        self._sums[layer] += torch.stack(sums)
        more = (n, n - 1, int(after.any(-1).sum()))
        self._numbers[layer] = [old + new for old, new in zip(self._numbers[layer], more, strict=True)]
        hardest = a[:, 1:, 1:].amax((-1, -2)).tolist()
        for at in self.places:
            if at[0] == layer:
                self.strength[at][row] = hardest[at[1]]

    def metrics(self, at: Head) -> dict[str, Any]:
        """Return the row of one head."""
        layer, head = at
        queries, pairs, repeated = self._numbers[layer]
        own, before, entropy, far, square, back = self._sums[layer][:, head].tolist()
        distance = far / queries
        found = [own / queries, before / pairs, entropy / queries, distance, square / queries - distance**2]
        found.append(back / repeated if repeated else math.nan)
        rounded = (None if math.isnan(x) else round(x, 4) for x in found)
        return {"layer": layer, "head": head, **dict(zip(METRICS, rounded, strict=True))}


def _chosen(
    strength: Mapping[int, float], rows: Sequence[int], intervals: int, shown: int, strongest: int, seed: int
) -> dict[int, int]:
    """Return the sequences that are shown of a head, with their intervals, in the order of their intervals."""
    order, g, out = sorted(rows, key=lambda row: (strength[row], -row)), generator(seed), dict[int, int]()
    for i in range(intervals):
        mine = order[i * len(order) // intervals : (i + 1) * len(order) // intervals]
        if i == intervals - 1:
            mine = mine[::-1][:strongest]
        else:
            mine = [mine[j] for j in torch.randperm(len(mine), generator=g)[:shown].tolist()]
        out |= dict.fromkeys(mine, i + 1)
    return out


def _sparse(a: Float[Tensor, "q_pos k_pos"], keys: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return flat indices and values of the largest attention of every query."""
    n = len(a)
    values, at = a.topk(min(keys, n), -1)
    flat = (torch.arange(n)[:, None] * n + at)[values >= threshold]
    order = flat.argsort()
    return flat[order].numpy(), values[values >= threshold][order].double().numpy().round(4)


def _page(
    model: Model,
    tokens: Tokens,
    whole: Totals,
    at: Head,
    chosen: Mapping[int, int],
    kept: Mapping[tuple[Head, int], tuple[np.ndarray, np.ndarray]],
) -> dict[str, Any]:
    sequences = []
    for row, interval in chosen.items():
        ids, (flat, values) = tokens.ids[row][tokens.mask[row]], kept[at, row]
        sequences.append(
            {
                "sequence_id": row,
                "interval": interval,
                "tokens": model.text.token_texts(ids),
                "attention_indices": flat.tolist(),
                "attention_values": values.tolist(),
                "seq_len": len(ids),
                "max_activation": round(whole.strength[at][row], 4),
            }
        )
    every = np.array(list(whole.strength[at].values()))
    counts = np.bincount((every * _BINS).astype(int).clip(0, _BINS - 1), minlength=_BINS)
    return {
        "sequences": sequences,
        "qk_distance_histogram": _distances(sequences),
        "top_query_tokens": _top(sequences, query=True),
        "top_key_tokens": _top(sequences, query=False),
        "histogram": histogram((round(i / _BINS, 4) for i in range(_BINS + 1)), counts.tolist()),
        "statistics": {"n_samples": len(sequences), "mean_max_activation": round(float(every.mean()), 4)},
    }


def _looks(sequences: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], int, int, float]]:
    """Yield query, key and attention of every entry that is kept, with its sequence."""
    for one in sequences:
        for flat, value in zip(one["attention_indices"], one["attention_values"], strict=True):
            query, key = divmod(flat, one["seq_len"])
            yield one, query, key, value


def _distances(sequences: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    sums = [0.0] * max(_BUCKETS, max(one["seq_len"] for one in sequences).bit_length() + 1)
    for _, query, key, value in _looks(sequences):
        sums[(query - key).bit_length()] += value
    return histogram([0, *(1 << i for i in range(len(sums)))], (round(x, 4) for x in sums))


def _top(sequences: Sequence[Mapping[str, Any]], query: bool) -> list[dict[str, Any]]:
    """Return the tokens with the largest attention as queries or as keys."""
    mass = dict[str, float]()
    for one, q, k, value in _looks(sequences):
        token = one["tokens"][q if query else k]
        mass[token] = mass.get(token, 0.0) + value
    ranked = sorted(mass.items(), key=lambda x: -x[1])[:_TOKENS]
    return [{"token": token, "weight": round(weight, 4)} for token, weight in ranked]


def _config(
    model: Model, tokens: Tokens, prompts: Prompts | Repeats, places: Sequence[Head], intervals: int
) -> dict[str, Any]:
    data = {
        "dataset_name": prompts.identity()["name"],
        "n_sequences": len(tokens),
        "seq_len": int(tokens.lengths.max()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": str(getattr(model.hf.config, "_attn_implementation", "eager")),
    }
    return {
        "model_name": model.name,
        "dataset_name": data["dataset_name"],
        "heads": [list(at) for at in places],
        "n_layers": model.shape.n_layers,
        "n_heads": model.shape.n_heads,
        "n_intervals": intervals,
        "metrics": list(METRICS),
        "metric_descriptions": {name: text for name, (_, text) in METRICS.items()},
        "head_data_pattern": PATTERN,
        "has_umap": False,
        "umap_heads": [],
        "pipeline_config": {"model_name": model.name, **data},
    }
