"""Norms as affine maps with a frozen scale: out = (x − centre(x)) / scale · weight + bias.

The effective weight (Gemma's 1 + w), the centring and the epsilon are measured on the module itself, because families
hide them under different names; a norm that is not of this form is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cutaway.core.refuse import Refused
from cutaway.models.anatomy.offload import present


@dataclass(frozen=True)
class Norm:
    """A norm in affine form.

    Attributes:
        weight: effective weight [d_model], in float32 or better.
        bias: effective bias [d_model].
        centred: True if it subtracts the mean.
        eps: added to the variance.
    """

    weight: Float[Tensor, "d_model"]
    bias: Float[Tensor, "d_model"]
    centred: bool
    eps: float

    def centre(self, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        """x, minus its mean where the norm subtracts it."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest"]:
        """Return the divisor √(mean square + ε) of each vector."""
        return (self.centre(wide(x)).pow(2).mean(-1) + self.eps).sqrt()

    def linear(
        self, x: Float[Tensor, "*rest d_model"], scale: Float[Tensor, "*rest"]
    ) -> Float[Tensor, "*rest d_model"]:
        """Return the norm's linear part with its scale frozen: additive over summands of x; the bias is left out."""
        return self.centre(x) / scale.unsqueeze(-1) * self.weight.to(x.dtype)

    def pulled(
        self, slopes: Float[Tensor, "*rest d_model"], x: Float[Tensor, "*rest_of_x d_model"], constant: bool = False
    ) -> Float[Tensor, "*rest d_model"]:
        """Return gradients at the norm's output as gradients at its input `x`, which broadcasts to them.

        With `constant` its divisor counts as a constant.
        """
        own = self.centre(slopes * self.weight.to(slopes))
        scale = self.scale(x).to(slopes).unsqueeze(-1)
        if constant:
            return own / scale
        unit = self.centre(x).to(slopes) / scale
        return (own - unit * (own * unit).mean(-1, keepdim=True)) / scale

    def folded(self, readers: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        """Return vectors that read the norm's output as vectors that read its input; its scale is left out."""
        return self.centre(readers * self.weight.to(readers))


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def measure(module: nn.Module, width: int) -> Norm:
    """Return the affine form of a norm module, measured by calling it on a few vectors.

    Raises:
        Refused: the module is not a LayerNorm- or RMSNorm-like map.
    """
    with present(module):
        return _measured(module, width)


def _measured(module: nn.Module, width: int) -> Norm:
    parameter = next(module.parameters(), torch.empty(0))
    if parameter.is_meta:
        return Norm(torch.ones(width), torch.zeros(width), isinstance(module, nn.LayerNorm), 1e-5)
    with torch.no_grad():
        norm = _fit(_shadow(module), torch.randn(3, width, generator=torch.Generator().manual_seed(0)).double())
    if norm is None:
        raise Refused(
            f"norm {type(module).__name__}", "it is not (x − centre) / scale · weight + bias", "leave out its scale"
        )
    kept = {"device": parameter.device, "dtype": torch.promote_types(parameter.dtype, torch.float32)}
    return Norm(norm.weight.to(**kept), norm.bias.to(**kept), norm.centred, norm.eps)


def _fit(call: nn.Module, probes: Float[Tensor, "probe d_model"]) -> Norm | None:
    """Return the affine form that explains a norm's values at some probes, or None if none does."""
    probes[1] += 3.0
    bias = call(torch.zeros_like(probes[:1]))[0]
    out = call(probes[:, None])[:, 0] - bias
    shifted = call(probes[1:2, None] + 5.0)[0, 0] - bias
    centred = bool((shifted - out[1]).abs().max() < 1e-3 * out[1].abs().max())
    centre = probes - probes.mean(-1, keepdim=True) if centred else probes
    square = centre.pow(2).mean(-1)
    known = (getattr(call, n, None) for n in ("eps", "variance_epsilon"))
    eps = next((float(e) for e in known if e is not None), None)
    if eps is None:  # a vector a thousand times shorter tells it
        short = call(1e-3 * probes[:1, None])[0, 0] - bias
        ratio = ((out[0] @ short) / (short @ short) * 1e-3) ** 2  # (1e-6 · square + ε) / (square + ε)
        eps = max(float(square[0] * (ratio - 1e-6) / (1 - ratio)), 0.0)
    norm = Norm(out[0] * (square[0] + eps).sqrt() / centre[0], bias, centred, eps)
    rebuilt = norm.linear(probes, (square + eps).sqrt())
    return norm if torch.allclose(rebuilt, out, rtol=1e-3, atol=1e-4 * float(out.abs().max())) else None


def _shadow(module: nn.Module) -> nn.Module:
    """Return the same norm in float64 on the CPU, without hooks, so that measuring never touches the user's model."""
    shadow = copy(module)
    shadow.__dict__ = dict(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        own = {n: t.detach().cpu() if t is not None else None for n, t in module.__dict__[kind].items()}
        shadow.__dict__[kind] = {
            n: t.double() if t is not None and t.is_floating_point() else t for n, t in own.items()
        }
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        shadow.__dict__[kind] = OrderedDict()
    shadow.__dict__["training"] = False
    shadow.__dict__.pop("forward", None)  # another library's wrapper is bound to the original
    return shadow
