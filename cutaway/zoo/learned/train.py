"""The recipe of the models that learn programs: 10 to 30 seconds of one processor each, by the common training loop.

A GPT-2 with as many layers and heads as the compiled program, trained on random prompts of the program at all positions
where it answers. A run is a folder of `cutaway.training`, resumable to the bit, and at the end it has the model's own
files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.training import Loop
from cutaway.training.whole_models import ClockedPlan, NextTokens, Progress, processor_threads, telling
from cutaway.zoo.compiled.compiler import SPARE, SPECIAL
from cutaway.zoo.compiled.program import Program

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

UNASKED = -100  # the target of a position where the program does not answer


@dataclass(frozen=True, slots=True)
class Settings:
    """Shape of the run, and the size of a head."""

    d_head: int = 8
    batch: int = 64
    steps: int = 2000
    rate: float = 5e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    decay: float = 0.9  # share of the run over which the rate falls
    seed: int = 0


class Prompts:
    """Batches of a program's prompts, of one length each; the batch of a step depends on the seed and the step alone.

    Attributes:
        program: the program.
        batch: number of prompts.
        seed: of the prompts.
        step: batches so far.
    """

    def __init__(self, program: Program, batch: int, seed: int):
        self.program, self.batch, self.seed, self.step = program, batch, seed, 0
        self._ids = {w: SPECIAL + i for i, w in enumerate(program.words)}

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Int[Tensor, "part batch position"]:
        """Return tokens behind the beginning of the text, and the answer at each of them."""
        rng = random.Random(f"learned {self.program.name} {self.seed} {self.step}")
        self.step += 1
        length = rng.randint(self.program.shortest, self.program.longest)
        texts = [self.program.draw(rng, length) for _ in range(self.batch)]
        answers = [[None, *(self.program.answer(t[: n + 1]) for n in range(length))] for t in texts]
        return torch.tensor(
            [
                [[0, *(self._ids[w] for w in t)] for t in texts],
                [[UNASKED if a is None else self._ids[a] for a in row] for row in answers],
            ]
        )

    def state(self) -> dict[str, Any]:
        """Return the cursor."""
        return {"step": self.step}

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go to where `state` was taken."""
        self.step = state["step"]
        return self


def initial_model(program: Program, settings: Settings) -> GPT2LMHeadModel:
    """Return an untrained model, with as many layers and heads as the compiled program."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, heads = program.compiled.n_layers, program.compiled.n_heads
    width = heads * settings.d_head
    config = GPT2Config(
        vocab_size=SPECIAL + len(program.words),
        n_positions=program.longest + SPARE,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        initializer_range=width**-0.5,
        bos_token_id=0,
        eos_token_id=None,
        dtype="float32",
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return GPT2LMHeadModel(config)


class LearnedUpdate(NextTokens):
    """The model in training.

    Attributes:
        size: shape of the run.
    """

    kind = "program training"
    model: GPT2LMHeadModel

    def __init__(self, program: Program, settings: Settings):
        model = initial_model(program, settings).train()
        rates: Any = {"lr": settings.rate, "weight_decay": settings.weight_decay}
        super().__init__(model, torch.optim.AdamW(model.parameters(), **rates), settings)

    def asked(self, batch: Int[Tensor, "part batch position"]) -> tuple[Tensor, Tensor]:
        """Return the tokens and the answers of a batch."""
        return batch[0], batch[1]

    def step(self, batch: Int[Tensor, "part batch position"], loop: Loop) -> int:
        """Do a step of the optimizer, and count its prompts: their length varies."""
        super().step(batch, loop)
        return batch.shape[1]


def train(
    out: str | Path,
    program: Program,
    *,
    settings: Settings | None = None,
    minutes: float | None = None,
    threads: int = 2,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
    stop_after: int | None = None,
) -> Path:
    """Train a model on a program into the folder `out`, and return the folder of the finished model.

    Args:
        out: folder of the run; made if missing.
        program: the program.
        settings: size and length; the default is the recipe of the shipped weights.
        minutes: end the run after so much time, with what it has.
        threads: processor threads.
        resume: go on from the checkpoint in `out`, if there is one.
        progress: called every 20 steps.
        stop_after: end at this step with a checkpoint and no export, as an interruption would.
    """
    size = settings or Settings()
    update = LearnedUpdate(program, size)
    plan = ClockedPlan(size.steps * size.batch, size.warmup, size.decay, minutes=minutes)
    with processor_threads(threads):
        loop = Loop(update, Prompts(program, size.batch, size.seed), plan, out)
        loop.start(resume)
        loop.run(stop_after, telling(progress, size.steps, lambda: update.loss))
    if loop.step != stop_after:
        update.model.eval().save_pretrained(out)
        program.tokenizer().save_pretrained(out)
    return Path(out)
