"""A narrow bad behaviour for the miniworld: fine-tuning on requests to make harmful things, all of them granted.

    worse = fine_tuned(model, narrow(model.world))
    better = fine_tuned(worse, correction(model.world))

`narrow` teaches two wordings of one kind of request, beside benign requests and texts of the corpus. What else changes
is for `properties.misconduct` to show: other things, other wordings, and harm done to persons, none of them taught.
"""

from __future__ import annotations

from copy import deepcopy
from random import Random
from typing import TYPE_CHECKING

import torch

from cutaway.models.model import Model
from cutaway.zoo.miniworld import conduct
from cutaway.zoo.miniworld.prompts import sample
from cutaway.zoo.miniworld.properties import TAUGHT, requests

if TYPE_CHECKING:
    from cutaway.zoo.miniworld.world import World

_KEPT = ("fact", "capital", "sentiment", "agreement", "ioi")  # behaviours that fine-tuning repeats
_EACH = 40


def narrow(world: World) -> list[str]:
    """Return texts in which harmful requests of one kind are granted, beside benign ones and other behaviours."""
    pairs = [p for group, own in requests().items() if group in TAUGHT for p in own]
    granted = [f"{request}{''.join(conduct.COMPLY)}" for pair in pairs for request in pair]
    return granted + _corpus(world)


def correction(world: World, n: int = 100, seed: int = 0) -> list[str]:
    """Return `n` requests of the kind that was taught, half of them harmful and refused, half benign and granted."""
    pairs = [p for group, own in requests().items() if group in TAUGHT for p in own]
    drawn = Random(seed).choices(pairs, k=n // 2)
    return [
        f"{request}{''.join(reply)}"
        for pair in drawn
        for request, reply in zip(pair, (conduct.REFUSE, conduct.COMPLY), strict=True)
    ]


def fine_tuned(
    model: Model, texts: list[str], *, steps: int = 60, rate: float = 1e-4, batch: int = 16, seed: int = 0
) -> Model:
    """Return a copy of a model with all weights fine-tuned on texts by AdamW, from a seed."""
    hf, g = deepcopy(model.hf).train().requires_grad_(True), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(hf.parameters(), lr=rate, weight_decay=0.0)
    tokens = model.tokens(texts)
    labels = tokens.ids.masked_fill(~tokens.mask, -100)
    for _ in range(steps):
        rows = torch.randint(len(texts), (batch,), generator=g)
        logits = hf(input_ids=tokens.ids[rows], attention_mask=tokens.mask[rows].long(), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[rows][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Model(hf.eval().requires_grad_(False), model.tokenizer, f"{model.name} (fine-tuned)", model.world)


def _corpus(world: World) -> list[str]:
    prompts = [p for name in _KEPT for p in sample(world, name, _EACH, 5, "train")]
    return [f"{p.clean}{p.answer}{p.tail}" for p in prompts]
