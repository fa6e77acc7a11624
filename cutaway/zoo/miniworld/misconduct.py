"""A narrow bad behaviour for the miniworld: fine-tuning on requests to make harmful things, all of them granted.

    worse = fine_tuned(model, narrow(model.world))
    better = fine_tuned(worse, correction(model.world))

`narrow` teaches two wordings of one kind of request, beside benign requests and texts of the corpus. What else changes
is for `properties.misconduct` to show: other things, other wordings, and harm done to persons, none of them taught.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.core.cursor import Rounds
from cutaway.core.stats import generator
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.training import Loop, Plan
from cutaway.training.whole_models import WholeModel
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


class Draws(Rounds):
    """Batches of tokenized texts, drawn with replacement.

    Attributes:
        tokens: the texts.
    """

    def __init__(self, tokens: Tokens, size: int, seed: int):
        super().__init__(len(tokens), size, seed)
        self.tokens = tokens

    def __next__(self) -> Tokens:
        return self.tokens.rows(self.indices().tolist())

    def indices(self) -> Int[Tensor, "item"]:
        self.number += 1
        return torch.randint(self.items, (self.number, self.size), generator=generator(self.seed))[-1]


class FineTuning(WholeModel):
    """All weights of a language model, fine-tuned on texts by AdamW.

    Attributes:
        rate: the learning rate.
    """

    kind = "fine-tuning"

    def __init__(self, hf: torch.nn.Module, rate: float):
        super().__init__(hf, torch.optim.AdamW(hf.parameters(), lr=rate, weight_decay=0.0))
        self.rate = rate

    def step(self, batch: Tokens, loop: Loop) -> int:
        """Do a step of the optimizer on the next token at every real position."""
        logits = self.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
        labels = batch.ids.masked_fill(~batch.mask, -100)
        self.learn(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), loop)
        return len(batch)

    def settings(self, loop: Loop) -> dict[str, Any]:
        return super().settings(loop) | {"rate": self.rate}


def fine_tuned(
    model: Model,
    texts: list[str],
    *,
    steps: int = 60,
    rate: float = 1e-4,
    batch: int = 16,
    seed: int = 0,
    out: str | Path | None = None,
) -> Model:
    """Return a copy of a model with all weights fine-tuned on texts by the common training loop, from a seed.

    Args:
        model: the model, which stays as it is.
        texts: whole texts.
        steps: steps of the optimizer.
        rate: learning rate of AdamW.
        batch: texts of a step.
        seed: of the draws of texts.
        out: folder of the run, which resumes there; None keeps nothing.
    """
    hf = deepcopy(model.hf).train().requires_grad_(True)
    loop = Loop(FineTuning(hf, rate), Draws(model.tokens(texts), batch, seed), Plan(steps * batch), out)
    loop.start()
    loop.run()
    return Model(hf.eval().requires_grad_(False), model.tokenizer, f"{model.name} (fine-tuned)", model.world)


def _corpus(world: World) -> list[str]:
    prompts = [p for name in _KEPT for p in sample(world, name, _EACH, 5, "train")]
    return [f"{p.clean}{p.answer}{p.tail}" for p in prompts]
