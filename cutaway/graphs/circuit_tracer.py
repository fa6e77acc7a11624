"""Raw graphs of circuit-tracer (`.pt`): the matrix of all edges, read without running any code of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.node import Error, Latent, Logit, Node
from cutaway.core.pt import Opaque, read_pt
from cutaway.core.refuse import Refused
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.influence import completeness, kind_of, masks, replacement, spread

_NEEDED = ("adjacency_matrix", "active_features", "activation_values", "logit_probabilities", "input_tokens")


def read_raw_graph(path: str | Path) -> AttributionGraph:
    """Read a raw graph of circuit-tracer, of version 0.5 or older.

    Its rows leave out constants, so that they do not close, and it has no control: `residual` and `value` are NaN.

    Raises:
        Refused: the file is missing or broken, or its parts do not fit together.
    """
    held = read_pt(path, objects=True)
    missing = [n for n in (*_NEEDED, "logit_targets") if n not in held]
    wrong = [n for n in _NEEDED if n in held and not isinstance(held[n], Tensor)]
    if missing or wrong:
        why = f"it holds no {missing[0]!r}" if missing else f"{wrong[0]!r} is no tensor"
        raise Refused(f"file {str(path)!r}", why, "give a raw graph of circuit-tracer")
    active, matrix = held["active_features"].long(), held["adjacency_matrix"].float()
    chosen = held.get("selected_features")
    chosen = torch.arange(len(active)) if chosen is None else chosen.long()
    ids, targets = held["input_tokens"].reshape(-1).tolist(), _targets(held["logit_targets"])
    width, ends, units = len(ids), len(targets), len(chosen)
    layers, left = divmod(len(matrix) - units - width - ends, max(width, 1))
    fits = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and left == 0 and layers > 0
    fits = fits and len(held["logit_probabilities"]) == ends and bool((chosen < len(active)).all())
    if not fits or bool((active[:, :2] >= torch.tensor([layers, width])).any()):
        why = f"a matrix of {tuple(matrix.shape)} does not hold {units} features, {width} tokens and {ends} logits"
        raise Refused(f"file {str(path)!r}", why, "export it again")
    names = _nodes(active[chosen], layers, width, targets)
    node_of = torch.cat([torch.arange(units), torch.arange(len(names) - ends, len(names))])
    weight, kinds = matrix[node_of].contiguous(), masks([kind_of(n) for n in names])
    share = torch.cat([torch.zeros(units), held["logit_probabilities"].float()])
    level = torch.cat([active[chosen, 0], torch.full((ends,), layers)])
    counted, unexplained = ~kinds["target"], kinds["error"]
    influence = spread(weight, node_of, level, share[None], counted)[0]
    activation = torch.zeros(len(names))
    activation[:units] = held["activation_values"].float()[chosen]
    texts = [str(n) for n in names]
    unknown = torch.full((len(node_of),), torch.nan)
    whole = influence[~kinds["unit"]].sum().clamp_min(1e-30)
    return AttributionGraph(
        influence=influence,
        influence_null=None,
        weight=weight,
        node_of=node_of,
        activation=activation,
        value=unknown,
        residual=unknown.clone(),
        share=share,
        replacement=replacement(influence, kinds["token"], unexplained),
        completeness=completeness(influence, weight, node_of, share, counted, unexplained),
        error_share=influence[unexplained].sum() / whole,
        others_share=torch.zeros(()),
        words=tuple(str(i) for i in ids),
        ids=tuple(ids),
        target_words=tuple(str(text) for text, _ in targets),
        layers=layers,
        vocabulary=int(held.get("vocab_size") or max(i for _, i in targets) + 1),
        leading=1,
        labels={"node": texts, "target": [texts[i] for i in node_of.tolist()]},
        units={"influence": "share of influence", "weight": "of its value"},
        reasons={"influence": "one prompt, and a file without a control", "residual": "the file has no constants"},
        record={"prompt": str(held.get("input_string", "")), "scan": str(held.get("scan", "")), "file": str(path)},
    )


def _targets(held: Any) -> list[tuple[str, int]]:
    """Return the words and the id of each target: ids alone in older files, objects of both in newer ones."""
    if isinstance(held, Tensor):
        return [(str(i), int(i)) for i in held.reshape(-1).tolist()]
    out = []
    for one in held if isinstance(held, list | tuple) else []:
        if isinstance(one, Opaque):
            state = (
                one.state
                if isinstance(one.state, dict)
                else dict(zip(("token_str", "vocab_idx"), one.args, strict=False))
            )
            out.append((str(state.get("token_str", "")), int(state["vocab_idx"])))
        else:
            out.append((str(one), int(one)))
    return out


def _nodes(features: Tensor, layers: int, width: int, targets: list[tuple[str, int]]) -> list[Node]:
    units = [Latent(layer, number, position) for layer, position, number in features.tolist()]
    errors = [Error(i, p) for i in range(layers) for p in range(width)]
    tokens = [Address("embed", position=p) for p in range(width)]
    return [*units, *errors, *tokens, *(Logit(i, width - 1) for _, i in targets)]
