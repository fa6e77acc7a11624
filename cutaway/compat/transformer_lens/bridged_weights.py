"""Weights of a bridged model, written: from TransformerLens' names and shapes into a house model that is one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.compat.transformer_lens.bridged import embedding
from cutaway.compat.transformer_lens.config import HookedTransformerConfig as Config
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.anatomy.linear import bias, matrix, table
from cutaway.models.anatomy.projections import projection
from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.loading.untied import untie


@torch.no_grad()
def store(root: Any, state: Mapping[str, Tensor]) -> None:
    """Write weights under TransformerLens' names into the house's model, which must be a copy of one's own.

    Raises:
        Refused: a weight that the model does not store as it applies it.
    """
    a, cfg = root.house.anatomy, root.cfg
    untie(a.hf)
    for name, value in state.items():
        component, _, weight = name.rpartition(".")
        if component == "embed":
            rows = table(a.hf.get_input_embeddings())
            rows.copy_(value * (rows.norm() / embedding(root.house).norm()))
        elif component == "pos_embed":
            a.top("pos").weight[-len(value) :].copy_(value)
        elif component == "unembed":
            way = unembedding(a)
            factor = way.gain * way.scale
            _put(way.head, value / factor if weight == "W_U" else value / way.scale, slice(None))
        elif component == "ln_final":
            _put_norm(a.top("final"), a, weight, value)
        else:
            layer, part = int(component.split(".")[1]), component.split(".")[2]
            _put_layer(a, cfg, layer, part, weight, value)


def _put_layer(a: Anatomy, cfg: Config, i: int, part: str, weight: str, value: Tensor) -> None:
    if part.startswith("ln"):
        return _put_norm(a.part(i, part), a, weight, value)
    kind, letter = weight.lstrip("_").split("_")
    if letter in ("Q", "K", "V"):
        module, columns = projection(a, i, letter.lower())  # type: ignore[arg-type, misc]
        _put(module, value.transpose(0, 1).flatten(1) if kind == "W" else value.flatten(), columns.flatten())
    elif letter == "O":
        _put(a.part(i, "o"), value.flatten(0, 1) if kind == "W" else value, slice(None))
    elif letter == "out":
        _put(a.part(i, "down"), value, slice(None))
    elif not (kind == "b" and cfg.gated_mlp):
        module = a.part(i, "gate" if letter == "gate" else "up")
        half = slice(None)
        if a.family.fused_gate:
            half = slice(0, cfg.d_mlp) if letter == "gate" else slice(cfg.d_mlp, None)
        _put(module, value, half)


def _put(module: Any, value: Tensor, columns: Any) -> None:
    """Write a matrix [inputs, outputs] or a bias [outputs] into some output columns of a linear module."""
    if value.ndim == 2:
        matrix(module)[:, columns] = value.to(matrix(module).dtype, copy=True)  # it may be a view of the weight
        return
    if module.bias is None:
        if not bool(value.any()):
            return
        module.bias = nn.Parameter(bias(module).clone())
    module.bias[columns] = value.to(module.bias.dtype, copy=True)


def _put_norm(module: Any, a: Anatomy, weight: str, value: Tensor) -> None:
    if weight == "b":
        module.bias.copy_(value)
    elif isinstance(getattr(module, "weight", None), Tensor):
        offset = (a.norm(module).weight - module.weight).mean().round()  # 1 where the family stores weight − 1
        module.weight.copy_(value - offset)


def clear_norms(root: Any) -> None:
    """Set the norms whose weights were folded to weight 1 and bias 0."""
    a = root.house.anatomy
    modules = [a.part(i, n) for i in range(root.cfg.n_layers) for n in ("ln1", "ln2")] + [a.top("final")]
    for module in [m for m in modules if m is not None]:
        norm = a.norm(module)
        with torch.no_grad():
            _put_norm(module, a, "w", torch.ones_like(norm.weight))
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
