"""Small models with circuits that are known, and prompts whose answers the third word decides."""

from __future__ import annotations

from functools import cache

import torch

from cutaway.models.model import Model
from cutaway.tasks.pair import Pair
from cutaway.tasks.task import Task
from tests.conformance.subjects import numbered, word_tokenizer
from tests.models.tiny import V, build


def task(model: Model, n: int = 6) -> Task:
    """Prompts of six words; the answer is what their third word speaks for most, so that it is worth much in each."""
    chance = torch.Generator().manual_seed(0)
    rows = torch.randint(3, V, (n, 6), generator=chance)
    other = rows.clone()
    other[:, 2] = (rows[:, 2] + 37) % (V - 3) + 3
    with torch.no_grad():
        change = model.hf(rows).logits[:, -1] - model.hf(other).logits[:, -1]
    best, worst = (x.tolist() for x in (change[:, 3:].argmax(1) + 3, change[:, 3:].argmin(1) + 3))
    texts = [[numbered(*row) for row in side.tolist()] for side in (rows, other)]
    pairs = (Pair(c, d, f"w{a}", f"w{b}") for c, d, a, b in zip(*texts, best, worst, strict=True))
    return Task("words", tuple(pairs), corruption="the third word becomes another")


@cache
def plain(name: str = "llama_gqa") -> Model:
    """A tiny random model."""
    hf = build(name)
    hf.requires_grad_(False)
    return Model(hf, word_tokenizer(V), name)


@cache
def cancelling() -> Model:
    """A Llama whose heads 0 and 1 of the first layer write the same, large, with opposite signs."""
    hf = build("llama")
    attention, width = hf.model.layers[0].self_attn, 8
    with torch.no_grad():
        for module in (attention.q_proj, attention.k_proj, attention.v_proj):
            module.weight[width : 2 * width] = module.weight[:width]
        attention.o_proj.weight[:, :width] *= 40.0
        attention.o_proj.weight[:, width : 2 * width] = -attention.o_proj.weight[:, :width]
    hf.requires_grad_(False)
    return Model(hf, word_tokenizer(V), "cancelling")
