"""Trainings of whole models: their update, packed weights and optimizers, a plan that follows the clock, threads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.training.guard import Guard
from cutaway.training.loop import Loop, Update
from cutaway.training.plan import Plan


@dataclass(frozen=True, slots=True)
class Progress:
    """State of a run at its last report, for the callback of its training."""

    step: int
    steps: int
    loss: float  # nats per token
    tokens_per_second: float
    seconds_left: float


def telling(
    progress: Callable[[Progress], None] | None, steps: int, loss: Callable[[], float]
) -> Callable[[Loop], None]:
    """Return the report of a loop that tells a callback of its progress; it does nothing without one."""

    def report(loop: Loop) -> None:
        if progress is not None:
            forecast = loop.forecast()
            progress(Progress(loop.step, steps, loss(), forecast.tokens_per_second, forecast.seconds_left))

    return report


@dataclass(frozen=True)
class ClockedPlan(Plan):
    """A plan that may be cut short after some `minutes` of training."""

    minutes: float | None = None

    def done(self, tokens: int, seconds: float) -> float:
        by_clock = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(super().done(tokens, seconds), by_clock)


@contextmanager
def processor_threads(n: int) -> Iterator[None]:
    """Compute with `n` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def packed(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the weights of a model and what its optimizers remember, by the names that checkpoints give them."""
    tensors: dict[str, Tensor] = {f"model/{k}": v.detach() for k, v in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for j, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{j}/{k}": torch.as_tensor(v) for k, v in entry.items()}
    return tensors


@torch.no_grad()
def take_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take up the weights of a checkpoint."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"model/{name}"])


def unpack(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Take up weights and optimizers from what `packed` returned."""
    take_weights(model, tensors)
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer/{i}/"):
                _, _, j, name = key.split("/")
                state.setdefault(int(j), {})[name] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


class WholeModel(Update):
    """Training of a model's own weights: inherit from it, and call `learn` with the loss of a batch from `step`.

    Attributes:
        model: the model, in train mode.
        optimizers: they share its parameters among them.
        clip: largest norm of the gradient; None leaves it as it is.
        loss: of the last step that changed the weights, in nats per token.
        guard: skips steps whose loss is not finite.
    """

    clip: float | None = None

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer):
        self.model, self.optimizers = model, optimizers
        self.loss, self.guard = math.nan, Guard()

    def learn(self, loss: Tensor, loop: Loop) -> None:
        """Do a step of all optimizers, unless the loss is not finite.

        Raises:
            Refused: it was not finite several times in a row.
        """
        if self.guard.passes(math.isfinite(value := loss.item()), loop):
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            for optimizer in self.optimizers:
                optimizer.step()
            self.model.zero_grad(set_to_none=True)
            self.loss = self.running(value)
        self.guard.check(self.kind, "use a lower rate")

    def running(self, loss: float) -> float:
        """Return the loss that is reported after a step: the step's own."""
        return loss

    def report(self, loop: Loop) -> list[dict[str, Any]]:
        return [{"loss": self.loss}]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return packed(self.model, self.optimizers), {"loss": self.loss, "lost": self.guard.lost}

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], loop: Loop) -> None:
        unpack(self.model, self.optimizers, tensors)
        self.loss, self.guard = record["loss"], Guard(record["lost"])


class NextTokens(WholeModel):
    """Training of a causal language model on the tokens that come next, at the rate that the plan schedules: inherit
    from it for a recipe.

    Attributes:
        size: settings of the run, a dataclass with its `rate` and its number of `steps`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, size: Any):
        super().__init__(model, optimizer)
        self.size = size

    def asked(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of a batch [batch position], and what comes next after the first of them [batch asked];
        −100 where nothing is asked.
        """
        return batch, batch[:, 1:]

    def step(self, batch: Tensor, loop: Loop) -> int:
        """Do a step of the optimizer."""
        for group in self.optimizers[0].param_groups:
            group["lr"] = self.size.rate * loop.plan.factor(loop.step, self.size.steps)
        tokens, targets = self.asked(batch)
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, : targets.shape[1]]
        self.learn(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), loop)
        return tokens.numel()

    def settings(self, loop: Loop) -> dict[str, Any]:
        return {"settings": dataclasses.asdict(self.size)}
