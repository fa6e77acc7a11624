"""The two products of a dictionary as differentiable functions, with gradients written by hand.

`read` gives pre-activations at chosen pairs (`follow` those of a greedy search), `write` decodes values. Their
gradients touch the same pairs only, so a training step costs one dense product (the selection) however many latents
there are; everything between the two (gates, penalties) is arithmetic on one number a pair, left to autograd. The bias
that is subtracted from the input gets its gradient through the sum of the latents' gradients, without the gradient of
the input.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cutaway.dictionaries.kernels.sparse import Pairs, dots, mix, spread, total


def read(
    x: Float[Tensor, "token d"],
    w: Float[Tensor, "latent d"],
    b: Float[Tensor, "latent"],
    p: Float[Tensor, "d"] | None,
    pairs: Pairs,
    value: Float[Tensor, "entry"] | None = None,
) -> Float[Tensor, "entry"]:
    """Pre-activations w (x − p) + b at pairs; `value`, if selection knows them already, is taken as they are."""
    return _Read.apply(x, w, b, p, pairs, value)  # type: ignore[return-value]


def follow(
    x: Float[Tensor, "token d"],
    w: Float[Tensor, "latent d"],
    p: Float[Tensor, "d"] | None,
    pairs: Pairs,
    value: Float[Tensor, "entry"],
    tangent: bool = False,
) -> Float[Tensor, "entry"]:
    """Return the values that matching pursuit found at pairs, as many a token, in the order of its steps.

    Step s gives max(r_s · w, 0) and leaves r_{s+1} = r_s − value · w, from r_0 = x − p on; the choices are held fixed.
    """
    return _Follow.apply(x, w, p, pairs, value, tangent)  # type: ignore[return-value]


def write(
    value: Float[Tensor, "entry"], w: Float[Tensor, "latent d"], pairs: Pairs, tangent: bool = False
) -> Float[Tensor, "token d"]:
    """Return the sum of value · w[latent] of each token.

    With `tangent`, the gradient of w has no part along w itself: rows of norm one that are scaled back after the step.
    """
    return _Write.apply(value, w, pairs, tangent)  # type: ignore[return-value]


def dense_read(
    x: Float[Tensor, "token d"], w: Float[Tensor, "latent d"], b: Float[Tensor, "latent"], p: Tensor | None
) -> Float[Tensor, "token latent"]:
    """Return all pre-activations; p enters through the latents' bias, so no gradient of x is formed."""
    return torch.addmm(b if p is None else b - w @ p, x, w.T)


class _Read(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, p: Tensor | None, pairs: Pairs, value: Any) -> Tensor:
        centred = x if p is None else x - p
        ctx.save_for_backward(centred, w)
        ctx.pairs = pairs
        return dots(centred, w, pairs) + b[pairs.index] if value is None else value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        centred, w = ctx.saved_tensors
        to_x, to_w, _, to_p = ctx.needs_input_grad[:4]
        d_b = total(ctx.pairs, grad)
        return (
            mix(ctx.pairs, grad, w) if to_x else None,
            spread(ctx.pairs, grad, centred) if to_w else None,
            d_b,
            -(d_b @ w) if to_p else None,
            None,
            None,
        )


class _Follow(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, p: Tensor | None, pairs: Pairs, value: Tensor, tangent: bool) -> Tensor:
        ctx.save_for_backward(x if p is None else x - p, w, value)
        ctx.pairs, ctx.tangent = pairs, tangent
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        centred, w, value = ctx.saved_tensors
        steps = [t.reshape(len(centred), -1).T for t in (ctx.pairs.index, value, grad)]
        rest = centred - mix(ctx.pairs, value, w)
        d_rest, d_w = torch.zeros_like(rest), torch.zeros_like(w)
        for index, v, g in zip(*(t.flip(0) for t in steps), strict=True):
            rows = w[index]
            rest = torch.addcmul(rest, v[:, None], rows)  # as it was before this step
            d_v = ((g - (d_rest * rows).sum(1)) * (v > 0))[:, None]
            d_w.index_add_(0, index, torch.addcmul(d_v * rest, v[:, None], d_rest, value=-1))
            d_rest = torch.addcmul(d_rest, d_v, rows)
        if ctx.tangent:
            d_w.addcmul_(w, (d_w * w).sum(1, keepdim=True), value=-1)
        to_x, _, to_p = ctx.needs_input_grad[:3]
        return d_rest if to_x else None, d_w, -d_rest.sum(0) if to_p else None, None, None, None


class _Write(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, w: Tensor, pairs: Pairs, tangent: bool) -> Tensor:
        ctx.save_for_backward(value, w)
        ctx.pairs, ctx.tangent = pairs, tangent
        return mix(pairs, value, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        value, w = ctx.saved_tensors
        grad = grad.contiguous()
        d_value = dots(grad, w, ctx.pairs)
        d_w = None
        if ctx.needs_input_grad[1]:
            d_w = spread(ctx.pairs, value, grad)
            if ctx.tangent:  # Σ value · (g · w) is the gradient along w already
                d_w.addcmul_(w, total(ctx.pairs, value * d_value)[:, None], value=-1)
        return d_value if ctx.needs_input_grad[0] else None, d_w, None, None
