"""Norms as affine maps with a frozen scale: out = (x − centre(x)) / scale · weight + bias.

The effective weight (Gemma's 1 + w), the centring and the epsilon are measured on the module itself, because families
hide them under different names; a norm that is not of this form is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cutaway.core.refuse import Refused


@dataclass(frozen=True)
class Norm:
    """One norm: `weight` and `bias` are effective, [d_model], in float32."""

    weight: Float[Tensor, "d_model"]
    bias: Float[Tensor, "d_model"]
    centred: bool
    eps: float

    def centre(self, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        """x, minus its mean where the norm subtracts it."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest"]:
        """The divisor √(mean square + ε) of each vector."""
        return (self.centre(x.float()).pow(2).mean(-1) + self.eps).sqrt()

    def linear(
        self, x: Float[Tensor, "*rest d_model"], scale: Float[Tensor, "*rest"]
    ) -> Float[Tensor, "*rest d_model"]:
        """The norm's linear part with its scale frozen: additive over summands of x; the bias is left out."""
        return self.centre(x) / scale.unsqueeze(-1) * self.weight.to(x.dtype)


def measure(module: nn.Module, width: int) -> Norm:
    """The affine form of a norm module, measured by calling it on a few vectors.

    Raises:
        Refused: the module is not a LayerNorm- or RMSNorm-like map.
    """
    parameter = next(module.parameters(), torch.empty(0))
    if parameter.is_meta:
        return Norm(torch.ones(width), torch.zeros(width), isinstance(module, nn.LayerNorm), 1e-5)
    g = torch.Generator().manual_seed(0)
    probes = torch.randn(3, width, generator=g)
    probes[1] += 3.0
    shadow = _float_copy(module)
    with torch.no_grad():
        bias = shadow(torch.zeros(1, width))[0]
        out = shadow(probes[:, None])[:, 0] - bias
        tiny = shadow(1e-3 * probes[:1, None])[:, 0] - bias
    shifted = (out[1] * 0 + shadow((probes[1] + 5.0)[None, None]).detach()[0, 0] - bias - out[1]).abs().max()
    centred = bool(shifted < 1e-3 * out[1].abs().max())
    centre = probes - probes.mean(-1, keepdim=True) if centred else probes
    big = centre.pow(2).mean(-1, keepdim=True)
    weight = out[0] * big[0].sqrt() / centre[0]
    ratio = ((weight * 1e-3 * centre[0]) @ tiny[0]) / (tiny[0] @ tiny[0])
    eps = _attribute(module) or max(float(ratio**2 - 1e-6 * big[0]), 0.0)
    weight = out[0] * (big[0] + eps).sqrt() / centre[0]
    norm = Norm(weight.to(parameter.device), bias.detach().to(parameter.device), centred, eps)
    rebuilt = Norm(weight, bias, centred, eps).linear(probes, (big[:, 0] + eps).sqrt())
    if not torch.allclose(rebuilt, out, rtol=1e-3, atol=1e-4 * float(out.abs().max())):
        raise Refused(
            f"norm {type(module).__name__}", "it is not (x − centre) / scale · weight + bias", "leave out its scale"
        )
    return norm


def _attribute(module: nn.Module) -> float | None:
    return next((float(e) for n in ("eps", "variance_epsilon") if (e := getattr(module, n, None)) is not None), None)


def _float_copy(module: nn.Module) -> nn.Module:
    """A float32 CPU copy of a norm, so that measuring never touches the user's model."""
    from copy import deepcopy

    shadow = deepcopy(module).float().cpu()
    shadow._forward_hooks.clear()
    shadow._forward_pre_hooks.clear()
    return shadow.eval()
