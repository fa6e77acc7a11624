"""Precision: what this machine may compute in fewer bits, decided by a measurement of error and time.

Two things can be gained on processors. PyTorch may hand float32 products to oneDNN instead of its default library
(the switch is called `bf16`; on processors without fast bfloat16 products it keeps float32 accuracy and is up to
twice as quick, on others it rounds). And candidates of a top-k gate may be found in bfloat16. Neither is taken on
trust: `measure` compares with float64 and with the clock in a few milliseconds, and what was chosen is data that a
record and a checkpoint can keep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.stats import generator
from cutaway.dictionaries.kernels.topk import Encoder, Shadow, top_k
from cutaway.models.access.fast_kernels import onednn_switch

Selection = Literal["float32", "bfloat16"]

FLOAT32_ERROR = 2e-6  # root mean square, relative: what a float32 product of a thousand terms may have
WORTH = 1.1  # a switch must be so much quicker
SAME = 0.9995  # share of chosen latents that must be those of float32


@dataclass(frozen=True)
class Choice:
    """Choice of kernels for products, with the measurements behind it.

    Attributes:
        onednn: True to use oneDNN for float32 products.
        select: precision in which candidates of top-k gates are found.
        onednn_error: relative error of oneDNN's products.
        onednn_speed: its speed-up.
        select_same: share of chosen latents that float32 chooses too.
        select_speed: speed-up of the selection.
    """

    onednn: bool = False
    select: Selection = "float32"
    onednn_error: float = float("nan")
    onednn_speed: float = float("nan")
    select_same: float = float("nan")
    select_speed: float = float("nan")

    def as_dict(self) -> dict[str, Any]:
        """Return the choice as JSON-ready data."""
        return asdict(self)


def measure(
    x: Float[Tensor, "token d"], w: Float[Tensor, "latent d"], b: Float[Tensor, "latent"], k: int | None = None
) -> Choice:
    """Decide on these tokens and this encoder: first the product, then, for a gate of k latents a token, selection."""
    choice = _measure_product(x.shape[1], x.device)
    if k is None:
        return choice
    tokens = x[: 128 if x.device.type == "cpu" else 4096]
    shadow = Shadow.of(w, b)
    with products(choice):
        exact, quick = Encoder(w, b), Encoder(w, b, shadow=shadow)
        same = agreement(top_k(tokens, exact, k), top_k(tokens, quick, k))
        speed = _times(lambda: top_k(tokens, exact, k)) / _times(lambda: top_k(tokens, quick, k))
    good = same >= SAME and speed >= WORTH
    return replace(choice, select="bfloat16" if good else "float32", select_same=same, select_speed=speed)


def agreement(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Return the share of the active latents of one choice that are active in the other."""

    def active(choice: tuple[Tensor, Tensor]) -> set[tuple[int, int]]:
        token, place = (choice[1] != 0).nonzero(as_tuple=True)
        return set(zip(token.tolist(), choice[0][token, place].tolist(), strict=True))

    first, second = active(one), active(other)
    return len(first & second) / len(first) if first else 1.0


@contextmanager
def products(choice: Choice) -> Iterator[None]:
    """Compute float32 products as chosen while open, and as before afterwards."""
    if not choice.onednn:
        yield
        return
    switch = onednn_switch()
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _measure_product(d: int, device: torch.device) -> Choice:
    if device.type != "cpu" or onednn_switch() is None:
        return Choice()
    g = generator(0)
    a, b = torch.randn(256, d, generator=g), torch.randn(512, d, generator=g)
    true = a.double() @ b.double().T
    plain = _times(lambda: a @ b.T)
    on = Choice(onednn=True)
    with products(on):
        error = float((a @ b.T - true).norm() / true.norm())
        quick = _times(lambda: a @ b.T)
    good = error <= FLOAT32_ERROR and plain / quick >= WORTH
    return Choice(onednn=good, onednn_error=error, onednn_speed=plain / quick)


def _times(work: Callable[[], Any], n: int = 3) -> float:
    """Return the seconds of the quickest of n runs, after one that is not counted."""
    work()
    best = float("inf")
    for _ in range(n):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
