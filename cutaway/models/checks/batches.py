"""Identities of how runs are put together: prompts in padding, variants in batches, new tokens over a cache.

The self-check holds each against the same prompts run alone and whole; the name of what fails is disabled on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from cutaway.core.refuse import Code, Refused
from cutaway.core.stats import generator
from cutaway.models.access.forward import PADDING, check_padding
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Add, Scale
from cutaway.models.generate import GENERATION, generated_ids
from cutaway.models.model import Model
from cutaway.models.sweep import executor, plan
from cutaway.models.sweep.partial_forward import held_back
from cutaway.models.tokens import Side, Tokens, batch


def prefix(model: Model, t: Tokens) -> float | None:
    """Compare variants joining at their own layer, over the keys and values of a prefix, with whole forwards."""
    if not model.family.causal or model.family.fixed_batch or model.anatomy.unembed is None or model.shape.n_layers < 2:
        return None
    return _swept(model, t, [[Add(f"resid_pre.{i}@{p}", _step(model))] for i in _layers(model) for p in (2, -1)])


def resumed(model: Model, t: Tokens) -> float | None:
    """Compare variants restarted at their layer, the blocks before it left out, with whole forwards."""
    if model.anatomy.unembed is None or model.shape.n_layers < 2:
        return None
    variants = [[Add(f"resid_pre.{i}", _step(model))] for i in _layers(model)[1:]]
    with model.edited(Scale("resid_pre.0", 1.0)):  # under other edits no batch grows
        return _swept(model, t, variants)


def padded(model: Model, t: Tokens, side: Side) -> float | None:
    """Compare the logits of a prompt padded to the length of a longer one with those of the prompt alone."""
    if model.anatomy.unembed is None or PADDING[side] in model.disabled:
        return None
    mixed = _mixed(model, t, side)
    try:
        check_padding(model.anatomy, mixed)
    except Refused:
        return None  # in better words than these
    return _apart(model.run_last(mixed), torch.cat([model.run_last(mixed.row(i)) for i in range(len(mixed))]))


def continued(model: Model, t: Tokens) -> float | None:
    """Compare the logits of a new token over the cache, under an edit of the prompt, with those of a whole forward."""
    if not model.family.causal or model.anatomy.unembed is None or not hasattr(model.hf, "generate"):
        return None
    edits: list[Edit] = [Add("resid_pre.0@1", _step(model))]
    # Compared is what the unembedding reads: a large vocabulary read for one row costs seconds in half precision.
    with held_back(model.anatomy) as read:
        ids = generated_ids(model, t, 2, edits, {"eos_token_id": None})
        if len(read) < 2:
            return None
        model.run_last(torch.cat([t.ids, ids[:, :1]], dim=1), edits)
    return _apart(read[1][:, -1], read[-1][:, -1])


def _swept(model: Model, t: Tokens, variants: Sequence[Sequence[Edit]]) -> float:
    got = executor.sweep(model, t, variants, lambda logits, prompt: logits.float())
    return _apart(got, torch.stack([model.run_last(t, v) for v in variants]))


def _mixed(model: Model, t: Tokens, side: Side) -> Tokens:
    rows = [t.ids[0].tolist(), t.ids[1, : t.ids.shape[1] // 2 + 1].tolist()]
    return model.tokens(batch(rows, side=side))


def _layers(model: Model) -> list[int]:
    return sorted({0, model.shape.n_layers - 1})


def _step(model: Model) -> Tensor:
    return torch.randn(model.shape.d_model, generator=generator(2)).to(model.device, model.dtype)


def _apart(a: Tensor, b: Tensor) -> float:
    a, b = a.float(), b.float()
    if a.shape != b.shape:
        raise Refused(
            "logits", f"{tuple(a.shape)} where {tuple(b.shape)} was expected", ("see ", Code("model.sites()"))
        )
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-9))


#: what each is called, what its failure disables, and its error
IDENTITIES: tuple[tuple[str, str, Callable[[Model, Tokens], float | None]], ...] = (
    ("variants over a prefix ≡ whole forwards", plan.PREFIX, prefix),
    ("variants from their layer on ≡ whole forwards", plan.RESUME, resumed),
    *((f"a prompt padded on the {side} ≡ the prompt alone", name, partial(padded, side=side))
      for side, name in PADDING.items()),
    ("a new token over the cache ≡ a whole forward", GENERATION, continued),
)  # fmt: skip
