"""JumpReLU: pre-activations above a learned threshold of their latent are active."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.gates.shared.gate import EncoderGate
from cutaway.dictionaries.gates.shared.train_gate import (
    Chosen,
    Flags,
    Own,
    TrainGate,
    at_pairs,
    pairs_of,
)
from cutaway.dictionaries.kernels import topk as select
from cutaway.dictionaries.kernels.topk import Encoder
from cutaway.dictionaries.objectives import L0, L0Target, PreActivation, Tanh, Term
from cutaway.dictionaries.objectives.active import Active

_ROWS = 64  # tokens of which all latents are computed together, so that they stay in the cache


@dataclass(frozen=True, eq=False)
class JumpRelu(EncoderGate):
    """f = π where π > θ, with one θ per latent (Rajamanoharan et al. 2024, arXiv:2407.14435).

    A latent with θ < 0 passes what is positive only, unless `signed`: then it passes negative values above θ as well.
    """

    threshold: Float[Tensor, "latent"]
    signed: bool = False

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        passed = pre if self.signed else pre.relu()
        return SparseCode.from_dense(passed * (pre > self.threshold))


@dataclass(frozen=True)
class TrainJumpRelu(TrainGate):
    """Values above a learned threshold θ = exp(t), whose gradient is estimated from pairs within width / 2 of it.

    With K = 1 if |π − θ| < width / 2: dθ of the value is −θ/width · K and dθ of the step −1/width · K (Rajamanoharan
    et al. 2024, arXiv:2407.14435). With `to_input` the estimate reaches π as well, with the opposite sign (Anthropic,
    January 2025).
    """

    flags: ClassVar = ("penalty", "penalty_kind", "l0")
    penalties: ClassVar = ("step", "tanh", "quadratic")
    retrained_by: ClassVar = "BatchTopK"  # whose one threshold can be written as a JumpReLU's
    start: float = 0.01
    width: float = 0.05
    to_input: bool = False

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {"step", "threshold"}

    def parameters(self, n: int) -> dict[str, Tensor]:
        return {"log_threshold": torch.full((n,), self.start).log()}

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        return Chosen(*select.above(x, encoder, own["log_threshold"].detach().exp() - self.width / 2))

    def active(self, pre: Tensor, chosen: Chosen | None, tokens: int, own: Own) -> Active:
        theta = own["log_threshold"].exp()
        value, step = _Jump.apply(pre, at_pairs(theta, chosen), self.width, self.to_input)  # type: ignore[misc]
        return Active(pre, value, pairs_of(chosen), tokens, {"step": step, "threshold": theta})

    def gate(self, own: Own) -> JumpRelu:
        return JumpRelu(own["log_threshold"].detach().exp())

    def customary(self) -> tuple[Term, ...]:
        return (L0(0.5),)

    @classmethod
    def of_flags(cls, flags: Flags) -> tuple[TrainGate, tuple[Term, ...]]:
        kind, l0 = flags.penalty_kind or ("quadratic" if flags.l0 is not None else "step"), flags.l0
        if kind != "quadratic" and l0 is not None:
            what = f"--l0 with --penalty-kind {kind}"
            raise Refused(what, "that penalty aims at no number", "use --penalty-kind quadratic")
        wide = cls(start=0.1, width=2.0, to_input=True)
        if kind == "step":
            return cls(), (L0(flags.weight(0.5)),)
        if kind == "tanh":  # Anthropic, January 2025
            return wide, (Tanh(flags.weight(5.0)), PreActivation())
        if l0 is None:
            why = "it aims at a number of active latents"
            raise Refused("--penalty-kind quadratic", why, "give --l0, such as --l0 16")
        if not l0 > 0:
            why = "the number of active latents per token is positive"
            raise Refused(f"--l0 {l0}", why, "give for example --l0 16")
        # thresholds alone are too slow to reach a target: the estimate moves encoders as well
        return wide, (L0Target(flags.weight(30.0), l0),)


class _Jump(torch.autograd.Function):
    """Value and step of a jump; where all latents are there, a few rows at a time, so that they stay in the cache."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float, to_input: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, theta)
        ctx.width, ctx.to_input = width, to_input
        ctx.set_materialize_grads(False)
        value, step = torch.empty_like(pre), torch.empty_like(pre)
        for x, v, s, t in _parts(theta, pre, value, step):
            torch.gt(x, t, out=s)
            torch.mul(x, s, out=v)
        return value, step

    @staticmethod
    def backward(ctx: Any, of_value: Tensor | None, of_step: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        pre, theta = ctx.saved_tensors
        out, to_theta = torch.zeros_like(pre), torch.zeros_like(theta)
        none = pre.new_zeros(()).expand_as(pre)
        to_value, to_step = (none if g is None else g for g in (of_value, of_step))
        for x, g, h, o, t in _parts(theta, pre, to_value, to_step, out):
            near = (x - t).abs_().lt(ctx.width / 2).to(x.dtype)
            near.mul_(torch.addcmul(h, g, t)).div_(ctx.width)  # the value's estimate stands at θ
            torch.mul(g, x > t, out=o)
            if ctx.to_input:
                o.add_(near)
            if x.ndim == 2:
                to_theta.sub_(near.sum(0))
            else:
                to_theta.sub_(near)
        return out, to_theta, None, None


def _parts(theta: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield a few rows of each tensor at a time, with the thresholds; all at once where there is one number a pair."""
    if tensors[0].ndim == 1:
        yield (*tensors, theta)
        return
    for rows in zip(*(t.split(_ROWS) for t in tensors), strict=True):
        yield (*rows, theta)
