"""Raw graphs of circuit-tracer: the matrix of all edges and its parts by name, from `.pt` files without running any
code of theirs, and of traced graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.files import reading
from cutaway.core.node import Error, Latent, Logit, Node
from cutaway.core.pt import Opaque, read_pt
from cutaway.core.refuse import Refused
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.influence import graph_scores, kind_of, masks, sources, spread

_TENSORS = ("adjacency_matrix", "active_features", "activation_values", "logit_probabilities", "input_tokens")


@dataclass(frozen=True)
class _Raw:
    """The parts of a raw graph.

    Attributes:
        matrix: the edges, a row per target: features, errors, tokens, logits.
        features: the layer, position and number of each feature.
        activation: the activation of each feature.
        ids: the token ids of the prompt.
        targets: the words and the token id of each logit.
        probability: the probability of each logit.
        layers: the number of layers.
        vocabulary: the number of tokens of the model.
    """

    matrix: Float[Tensor, "node node"]
    features: Int[Tensor, "feature 3"]
    activation: Float[Tensor, "feature"]
    ids: list[int]
    targets: list[tuple[str, int]]
    probability: Float[Tensor, "logit"]
    layers: int
    vocabulary: int

    def nodes(self) -> list[Node]:
        """Return the nodes in the order of the matrix."""
        width = len(self.ids)
        units = [Latent(layer, number, position) for layer, position, number in self.features.tolist()]
        errors = [Error(i, p) for i in range(self.layers) for p in range(width)]
        tokens = [Address("embed", position=p) for p in range(width)]
        return [*units, *errors, *tokens, *(Logit(i, width - 1) for _, i in self.targets)]


def read_raw_graph(path: str | Path) -> AttributionGraph:
    """Read a raw graph of circuit-tracer, of version 0.5 or older.

    Its rows leave out constants, so that they do not close, and it has no control: `residual` and `value` are NaN.

    Raises:
        Refused: the file is missing or broken, or its parts do not fit together.
    """
    held = read_pt(path, objects=True)
    missing = [n for n in (*_TENSORS, "logit_targets") if n not in held]
    wrong = [n for n in _TENSORS if n in held and not isinstance(held[n], Tensor)]
    if missing or wrong:
        why = f"it holds no {missing[0]!r}" if missing else f"{wrong[0]!r} is no tensor"
        raise Refused(f"file {str(path)!r}", why, "give a raw graph of circuit-tracer")
    with reading(path, "its parts do not fit together"):
        return raw_graph(held, {"file": str(path)})


def raw_graph(held: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> AttributionGraph:
    """Return the graph whose parts a raw graph holds by name, as `read_raw_graph` does.

    Raises:
        ValueError: the parts do not fit together.
    """
    return _graph(_raw(held), {"prompt": _text(held, "input_string"), "scan": _text(held, "scan"), **(record or {})})


def raw_parts(whole: AttributionGraph) -> dict[str, Any]:
    """Return the parts of a raw graph: features that are nodes, errors, tokens and targets, and the edges among these.

    Constants, position embeddings and units left out are no nodes there; errors that are zero are.
    """
    features = sorted((n.block, n.position or 0, n.index) for n in whole.nodes if isinstance(n, Latent))
    width, ends = len(whole.ids), len(whole.target_words)
    order: dict[Node, int] = {Latent(layer, i, p): k for k, (layer, p, i) in enumerate(features)}
    fixed = [Error(i, p) for i in range(whole.layers) for p in range(width)]
    fixed += [Address("embed", position=p) for p in range(width)]
    order |= {node: len(features) + k for k, node in enumerate([*fixed, *whole.nodes[-ends:]])}
    column = torch.tensor([order.get(node, -1) for node in whole.nodes])
    there, matrix = column >= 0, torch.zeros(len(order), len(order))
    matrix[column[whole.node_of][:, None], column[there]] = whole.weight[:, there].float()
    activation = torch.zeros(len(order))
    activation[column[there]] = whole.activation[there].float()
    ids = [n.token if isinstance(n, Logit) else whole.vocabulary + k for k, n in enumerate(whole.nodes[-ends:])]
    return {
        "input_tokens": torch.tensor(whole.ids),
        "adjacency_matrix": matrix,
        "active_features": torch.tensor(features).reshape(-1, 3),
        "activation_values": activation[: len(features)],
        "selected_features": torch.arange(len(features)),
        "logit_targets": list(zip(whole.target_words, ids, strict=True)),
        "logit_probabilities": whole.share[-ends:].float(),
        "vocab_size": whole.vocabulary,
    }


def _graph(raw: _Raw, record: dict[str, Any]) -> AttributionGraph:
    nodes, units, ends = raw.nodes(), len(raw.features), len(raw.targets)
    node_of = torch.cat([torch.arange(units), torch.arange(len(nodes) - ends, len(nodes))])
    weight, kinds = raw.matrix[node_of].contiguous(), masks([kind_of(n) for n in nodes])
    share = torch.cat([torch.zeros(units), raw.probability])
    level = torch.cat([raw.features[:, 0], torch.full((ends,), raw.layers)])
    influence = spread(weight, node_of, level, share[None], sources(kinds))[0]
    texts = [str(n) for n in nodes]
    unknown = torch.full((len(node_of),), torch.nan)
    return AttributionGraph(
        influence=influence,
        influence_null=None,
        excess=None,
        weight=weight,
        node_of=node_of,
        activation=torch.cat([raw.activation, torch.zeros(len(nodes) - units)]),
        value=unknown,
        residual=unknown.clone(),
        share=share,
        **graph_scores(influence, weight, node_of, share, kinds),
        words=tuple(str(i) for i in raw.ids),
        ids=tuple(raw.ids),
        target_words=tuple(text for text, _ in raw.targets),
        layers=raw.layers,
        vocabulary=raw.vocabulary,
        leading=1,
        labels={"node": texts, "target": [texts[i] for i in node_of.tolist()]},
        units={"influence": "share of influence", "weight": "of its value"},
        reasons={"influence": "one prompt, and a file without a control", "residual": "the file has no constants"},
        record=record,
    )


def _raw(held: Mapping[str, Any]) -> _Raw:
    """Return the parts of a file.

    Raises:
        ValueError: they do not fit together; other errors where a part is something else than it should be.
    """
    matrix, active, ids = held["adjacency_matrix"].float(), held["active_features"].long(), held["input_tokens"]
    targets, probability = _targets(held["logit_targets"]), held["logit_probabilities"].float()
    chosen = held.get("selected_features")
    features, activation = active, held["activation_values"].float()
    if chosen is not None:
        features, activation = active[chosen.long()], activation[chosen.long()]
    ids, units, ends = ids.reshape(-1).tolist(), len(features), len(targets)
    layers, left = divmod(len(matrix) - units - len(ids) - ends, max(len(ids), 1))
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    if not square or left or layers < 1 or not ends or probability.shape != (ends,) or activation.shape != (units,):
        parts = f"{units} features, {len(ids)} tokens and {ends} logits"
        raise ValueError(f"a matrix of {tuple(matrix.shape)} does not hold {parts}")
    if (
        features.shape != (units, 3)
        or bool((features < 0).any())
        or bool((features[:, :2] >= torch.tensor([layers, len(ids)])).any())
    ):
        raise ValueError(f"its features are not among {layers} layers and {len(ids)} positions")
    if not all(bool(t.isfinite().all()) for t in (matrix, probability, activation)):
        raise ValueError("some of its numbers are not finite")
    vocabulary = int(held.get("vocab_size") or max(i for _, i in targets) + 1)
    raw = _Raw(matrix, features, activation, ids, targets, probability, layers, vocabulary)
    if min(i for _, i in targets) < 0 or len(set(raw.nodes())) < len(matrix):
        raise ValueError("a feature or logit is there twice, or a logit of no token")
    return raw


def _text(held: Mapping[str, Any], name: str) -> str:
    return held[name] if isinstance(held.get(name), str) else ""


def _targets(held: Any) -> list[tuple[str, int]]:
    """Return the words and the id of each target: ids alone in older files, objects or pairs of both in newer ones."""
    each = held.reshape(-1).tolist() if isinstance(held, Tensor) else list(held)
    return [_target(one) if isinstance(one, Opaque | tuple) else (str(one), int(one)) for one in each]


def _target(one: Opaque | tuple[str, int]) -> tuple[str, int]:
    if isinstance(one, tuple):
        return str(one[0]), int(one[1])
    given = dict(zip(("token_str", "vocab_idx"), one.args, strict=False))
    state = one.state if isinstance(one.state, dict) else given
    return str(state.get("token_str", "")), int(state["vocab_idx"])
