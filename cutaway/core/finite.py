"""Infinite and undefined values: every forward records its largest value, and work that gave one is refused at its end.

A comparison, a rank or a largest value makes an ordinary number of NaN, so that a result does not show what it was made
of. Forwards therefore hand what they give to `notice`, which keeps the largest (NaN stays one) on the device, and
`finite` looks at it when its block is left: one synchronisation, whatever the number of forwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from cutaway.core.refuse import Code, Keyword, Refused

_LARGEST: ContextVar[list[Tensor] | None] = ContextVar("cutaway_largest", default=None)  # of the innermost block


@contextmanager
def finite(what: str, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Refuse work whose forwards gave numbers that are none; an error that they led to is refused with this reason.

    `what` names the work, `dtype` is the model's.

    Raises:
        Refused: a largest value inside was infinite or undefined.
    """
    seen: list[Tensor] = []
    token = _LARGEST.set(seen)
    try:
        yield
    except Exception as error:
        if overflowed(seen):
            raise refusal(what, dtype) from error
        raise
    finally:
        _LARGEST.reset(token)
    if overflowed(seen):
        raise refusal(what, dtype)


def notice(x: Tensor, real: Tensor | None = None) -> None:
    """Record the largest of a forward's numbers, at all positions or at those that are `real` [batch, position].

    Minus infinity counts as finite: families give it to tokens that they never predict.
    """
    seen = _LARGEST.get()
    if seen is None or not x.numel() or not x.is_floating_point():
        return
    x = x.detach()
    if real is not None and real.shape == x.shape[:2]:
        each = x.flatten(2).amax(-1) if x.ndim > 2 else x
        x = each.masked_fill(~real.to(x.device), 0.0)
    top = x.amax()
    seen[:] = [torch.maximum(seen[0], top.to(seen[0])) if seen else top]


def overflowed(seen: list[Tensor]) -> bool:
    """Return True if the largest value is infinite or undefined."""
    return bool(seen) and not float(seen[0]) < math.inf


def refusal(what: str, dtype: torch.dtype | None) -> Refused:
    """Return the refusal of work that gave infinite or undefined numbers."""
    if dtype == torch.float16:
        why = "the model gave numbers that are none: float16 ends at 65504, and its activations pass that"
        return Refused(what, why, ("use ", Keyword("dtype", "bfloat16", of="model")))
    why = "the model gave numbers that are none (infinite or undefined)"
    return Refused(
        what, why, (Code("look at run_last(prompts): "), "weights, edits or a whole attention row may be at fault")
    )
