"""Adam in one pass over the weights (PyTorch's fused kernel, private, so compared with the formula first)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamSettings:
    """Kingma & Ba 2015; `eps` is small because gradients of sparse weights are."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


class Adam:
    """The optimiser of one dictionary: moments by the names of the weights, and the number of steps."""

    def __init__(self, weights: Mapping[str, Tensor], settings: AdamSettings):
        self.weights, self.settings = dict(weights), settings
        self.first = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.second = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.steps = 0

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """Move the weights that have a gradient; the others stay."""
        self.steps += 1
        names = list(gradients)
        weights, found, first, second = (
            [t[n] for n in names] for t in (self.weights, gradients, self.first, self.second)
        )
        update = _fused if has_fused(weights[0].device.type, weights[0].dtype) else _plain
        with torch.no_grad():
            update(weights, found, first, second, self.steps, rate, self.settings)

    def state(self) -> dict[str, Tensor]:
        """Return the moments by name, for a checkpoint."""
        return {f"{kind}/{n}": t for kind in ("first", "second") for n, t in getattr(self, kind).items()}

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take up moments of an earlier `state`."""
        for kind in ("first", "second"):
            for n, t in getattr(self, kind).items():
                t.copy_(tensors[f"{kind}/{n}"])
        self.steps = steps


@cache
def has_fused(device: str, dtype: torch.dtype) -> bool:
    """True if PyTorch's fused kernel is there and agrees with the formula."""
    start = [
        torch.linspace(-1, 1, 12, device=device, dtype=dtype).reshape(3, 4),
        torch.ones(2, device=device, dtype=dtype),
    ]
    gradients = [torch.linspace(-3, 2, 12, device=device, dtype=dtype).reshape(3, 4), start[1] / 8]
    runs = []
    for update in (_fused, _plain):
        weights = [t.clone() for t in start]
        first, second = ([torch.zeros_like(t) for t in start] for _ in range(2))
        try:
            for step in (1, 2, 3):
                update(weights, [g * step for g in gradients], first, second, step, 0.01, AdamSettings())
        except (AttributeError, RuntimeError, TypeError):
            return False
        runs.append(weights + first + second)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*runs, strict=True))


def _fused(weights: Any, gradients: Any, first: Any, second: Any, step: int, rate: float, s: AdamSettings) -> None:
    steps = [torch.tensor(float(step), device=w.device) for w in weights]
    fixed = {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
    fused: Any = torch._fused_adam_  # pyright: ignore[reportPrivateImportUsage]
    fused(weights, gradients, first, second, [], steps, lr=rate, beta1=s.beta1, beta2=s.beta2, eps=s.eps, **fixed)


def _plain(weights: Any, gradients: Any, first: Any, second: Any, step: int, rate: float, s: AdamSettings) -> None:
    for w, g, m, v in zip(weights, gradients, first, second, strict=True):
        m.lerp_(g, 1 - s.beta1)
        v.mul_(s.beta2).addcmul_(g, g, value=1 - s.beta2)
        scale = (v.sqrt() / math.sqrt(1 - s.beta2**step)).add_(s.eps)
        w.addcdiv_(m, scale, value=-rate / (1 - s.beta1**step))
