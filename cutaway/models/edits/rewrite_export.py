"""Rewrites for other tools: a model folder of Hugging Face with the new weights, or an adapter of PEFT beside the old.

An adapter adds B A x · alpha / r to what a linear module computes, A [rank inputs] and B [outputs rank]. A rewrite by
factors u [inputs rank] and v [rank outputs] is the adapter A = uᵀ, B = vᵀ with alpha = r. Factors of a slice (a head's
query, some neurons) become those of the whole module, with zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cutaway.core.files import make_folder, new_folder, write_json
from cutaway.core.refuse import Refused
from cutaway.models.anatomy.linear import is_linear, matrix
from cutaway.models.edits.rewrites import Rewrite, place_of, rewritten, save_rewrites
from cutaway.models.loading.adapters import CONFIG, WEIGHTS
from cutaway.models.model import Model

REWRITES_FILE = "rewrites.safetensors"
_FOLDER = "write a model folder (export_model)"
Factors = tuple[Float[Tensor, "inputs rank"], Float[Tensor, "rank outputs"]]


def export_model(model: Model, path: str | Path, *rewrites: Rewrite) -> Path:
    """Write the model with its rewrites made to a new folder that transformers loads; the model itself stays as it is.

    The rewrites themselves lie beside the weights in `rewrites.safetensors`.

    Raises:
        Refused: a folder that is there already, or rewrites that do not fit.
    """
    new_folder(path)
    with rewritten(model, *rewrites):
        folder = make_folder(path)
        model.hf.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    save_rewrites(folder / REWRITES_FILE, *rewrites, record={"model": model.identity()})
    return folder


def export_adapter(model: Model, path: str | Path, *rewrites: Rewrite) -> Path:
    """Write the rewrites to a new folder as a LoRA adapter of PEFT for the model, without the package peft.

    Raises:
        Refused: a folder that is there already, a rewrite that is not given by factors or does not change a linear
            module, or rewrites that do not fit.
    """
    modules: dict[str, list[Factors]] = {}
    with rewritten(model):
        for rewrite in rewrites:
            name, factors = _of_module(model, rewrite)
            modules.setdefault(name, []).append(factors)
    if not modules:
        raise Refused("an adapter without rewrites", "it would change nothing", "give at least one rewrite")
    tensors: dict[str, Tensor] = {}
    for name, parts in modules.items():
        u, v = torch.cat([u for u, _ in parts], 1), torch.cat([v for _, v in parts], 0)
        tensors[f"base_model.model.{name}.lora_A.weight"] = u.T.float().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = v.T.float().cpu().contiguous()
    folder = make_folder(new_folder(path))
    _write_weights(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, _config(model, {n: sum(u.shape[1] for u, _ in p) for n, p in modules.items()}))
    save_rewrites(folder / REWRITES_FILE, *rewrites, record={"model": model.identity()})
    return folder


def _write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _config(model: Model, ranks: dict[str, int]) -> dict[str, Any]:
    """Return the configuration of an adapter whose modules have these ranks, each with alpha equal to its rank."""
    rank = next(iter(ranks.values()))
    others = {name: r for name, r in ranks.items() if r != rank}
    transposed = [hasattr(model.hf.get_submodule(name), "nf") for name in ranks]  # Conv1D stores inputs first
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(transposed),
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
    }


def _of_module(model: Model, rewrite: Rewrite) -> tuple[str, Factors]:
    """Return the linear module whose weight a rewrite changes, and the factors of the change of all of it."""
    what = f"an adapter for the rewrite of {rewrite.weight}"
    if rewrite.factors is None:
        raise Refused(what, "an adapter is of low rank, and it gives no factors", _FOLDER)
    place = place_of(model, rewrite)
    name, module = _owner(model.hf, place.views[0], what)
    whole = matrix(module)
    u, v = (t.to(whole.device, torch.float32) for t in rewrite.factors)
    views = place.views if place.per_head else place.views[0].unbind(0) if u.ndim == 3 else place.views
    parts = zip(u if u.ndim == 3 else u[None], v if v.ndim == 3 else v[None], strict=True)
    wide = [_widened(whole, view, rewrite, *own) for view, own in zip(views, parts, strict=True)]
    return name, (torch.cat([u for u, _ in wide], 1), torch.cat([v for _, v in wide], 0))


def _owner(hf: nn.Module, view: Tensor, what: str) -> tuple[str, nn.Module]:
    """Return the linear module in whose weight a view lies."""
    memory = view.untyped_storage().data_ptr()
    for name, module in hf.named_modules():
        weight = getattr(module, "weight", None)
        if not is_linear(module) or not isinstance(weight, Tensor) or weight.untyped_storage().data_ptr() != memory:
            continue
        if 0 <= view.data_ptr() - weight.data_ptr() < weight.numel() * weight.element_size():
            return name, module
    raise Refused(what, "it changes no linear module", _FOLDER)


def _widened(whole: Tensor, view: Tensor, rewrite: Rewrite, u: Tensor, v: Tensor) -> Factors:
    """Return factors of a slice of a matrix as factors of the matrix."""
    steps, offset = whole.stride(), (view.data_ptr() - whole.data_ptr()) // whole.element_size()
    slow = 0 if steps[0] >= steps[1] else 1
    first = [0, 0]
    first[slow], first[1 - slow] = divmod(offset, steps[slow])
    rows = _indices(first[0], view.shape[-2], rewrite.rows)
    columns = _indices(first[1], view.shape[-1], rewrite.columns)
    wide_u, wide_v = u.new_zeros(whole.shape[0], u.shape[-1]), v.new_zeros(v.shape[-2], whole.shape[1])
    wide_u[rows], wide_v[:, columns] = u, v
    return wide_u, wide_v


def _indices(first: int, size: int, chosen: Sequence[int] | None) -> Tensor:
    """Return the indices in a matrix of the chosen rows or columns of a slice that begins at `first`."""
    return first + torch.tensor(range(size) if chosen is None else chosen)
