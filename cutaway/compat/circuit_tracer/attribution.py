"""Attribution: the graph of a prompt, traced by the house, as a raw graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutaway.compat.circuit_tracer.graph import Graph, LogitTarget
from cutaway.compat.circuit_tracer.replacement_model import ReplacementModel
from cutaway.core.node import Direction, Logit
from cutaway.graphs.circuit_tracer import raw_parts
from cutaway.graphs.targets import Targets
from cutaway.graphs.trace import Run, prepare
from cutaway.tasks.prompts import as_prompts

__all__ = ["CustomTarget", "LogitTarget", "attribute"]


class CustomTarget(NamedTuple):
    """A direction of the last norm's output to explain, with its words and its weight."""

    token_str: str
    prob: float
    vec: Tensor


def attribute(
    prompt: Any,
    model: ReplacementModel,
    *,
    attribution_targets: Any = None,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    max_feature_nodes: int | None = None,
    **memory: Any,
) -> Graph:
    """Trace the graph of a prompt, toward its likeliest next tokens or toward tokens, token ids or `CustomTarget`s."""
    ids = model.ensure_tokenized(prompt)
    asked: list[Any] = [] if attribution_targets is None else list(attribution_targets)
    custom, text = isinstance(next(iter(asked), None), tuple), model.house.text
    tokens = [text.token_id(one) if isinstance(one, str) else int(one) for one in asked if not custom]
    leading, named = min(model.leading, len(ids) - 1), tuple(f"logit.{i}" for i in tokens)
    run = prepare(
        model.house, as_prompts(ids[None]), model.transcoders, named, max_n_logits, desired_logit_prob, leading, 1, 0
    )
    if tokens:
        share = run.frozen.acts["logits"][0, -1].softmax(-1)[tokens].to(run.targets.share)
        run = replace(run, targets=replace(run.targets, share=share))
    run = replace(run, targets=_custom(run, asked)) if custom else run
    table = run.units.table
    whole = run.graph(len(table) if max_feature_nodes is None else max_feature_nodes)
    parts = raw_parts(whole)
    if custom:
        parts["logit_targets"] = [(one[0], i) for one, (_, i) in zip(asked, parts["logit_targets"], strict=True)]
    active = torch.stack([table.layer, table.position, table.index, torch.arange(len(table))], 1).tolist()
    rank = {(layer, position, index): i for i, (layer, position, index, _) in enumerate(sorted(active))}
    parts["selected_features"] = torch.tensor([rank[tuple(row)] for row in parts["active_features"].tolist()]).long()
    parts["active_features"] = torch.tensor(list(rank)).reshape(-1, 3)
    parts["activation_values"] = table.activation.cpu()[torch.tensor([row[3] for row in sorted(active)]).long()]
    return Graph(input_string=model.tokenizer.decode(ids), cfg=model.cfg, scan=model.scan, **parts)


def _custom(run: Run, asked: Sequence[tuple[str, float, Tensor]]) -> Targets:
    """Return directions of the last norm's output as targets."""
    reader, constant = run.frozen.final_readers(torch.stack([one[2] for one in asked]).to(run.targets.vector))
    value = reader @ run.frozen.at(f"resid_post.{run.frozen.layers - 1}")[-1] + constant
    nodes: list[Logit | Direction] = [Direction(f"target-{i}", run.frozen.width - 1) for i in range(len(asked))]
    share = torch.tensor([one[1] for one in asked]).to(value)
    return replace(run.targets, nodes=nodes, vector=reader, constant=constant, value=value, share=share)
