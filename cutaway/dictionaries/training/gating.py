"""How each gate is trained: which pairs it uses, what their values are, and what it has learned in the end.

A gating is frozen numbers. What it learns (`parameters`) and keeps (`buffers`), one number a latent or a single one, is
held by the learner and handed in as `own`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.dictionaries import gates
from cutaway.dictionaries.kernels import topk as select
from cutaway.dictionaries.kernels.sparse import Pairs
from cutaway.dictionaries.kernels.topk import Encoder
from cutaway.dictionaries.training.objectives.active import Active

Own = Mapping[str, Tensor]
Chosen = tuple[Pairs, Tensor | None]
_ROWS = 64


class Gating(ABC):
    """One gate in training."""

    fixed = False  # whether it chooses a set number of latents, and so needs no dense form
    encodes = True  # whether it has an encoder; matching pursuit reads with the decoder's rows

    def parameters(self, n: int) -> dict[str, Tensor]:
        """What is learned by gradient, at the start."""
        return {}

    def buffers(self) -> dict[str, Tensor]:
        """What is kept from batch to batch, at the start."""
        return {}

    @abstractmethod
    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        """The pairs that may be active or get a gradient, and their pre-activations if they are known already."""

    @abstractmethod
    def active(self, pre: Tensor, pairs: Pairs | None, tokens: int, own: Own) -> Active:
        """Values from pre-activations, differentiable."""

    @abstractmethod
    def gate(self, own: Own) -> gates.AnyGate:
        """The gate of the finished dictionary."""

    def learned(self, active: Active, scale: Tensor | None, own: Own) -> None:  # noqa: B027 (most have nothing to do)
        """Take notice of a batch that has been trained on; `scale` are the norms of norm-aware gating."""

    def as_dict(self) -> dict[str, Any]:
        """Kind and numbers, ready for JSON."""
        return {"kind": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class TopK(Gating):
    """The k largest of each token; with `wide`, that many more are decoded once again for the loss of Multi-TopK."""

    k: int
    wide: int = 0
    fixed = True

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        index, value = select.top_k(x, encoder, min(max(self.k, self.wide), len(encoder.w)))
        return Pairs.fixed(index, len(encoder.w)), value.reshape(-1)

    def active(self, pre: Tensor, pairs: Pairs | None, tokens: int, own: Own) -> Active:
        value = pre.relu()
        if self.wide <= self.k:
            return Active(pre, value, pairs, tokens)
        rows = pre.detach().view(tokens, -1)
        inner = torch.zeros_like(rows).scatter_(1, rows.topk(self.k, sorted=False).indices, 1.0).view_as(pre)
        return Active(pre, value * inner, pairs, tokens, {"wide": value})

    def gate(self, own: Own) -> gates.AnyGate:
        return gates.TopK(self.k, multi=self.wide > self.k)


@dataclass(frozen=True)
class BatchTopK(Gating):
    """The k · tokens largest of the batch; a running mean of the smallest one becomes the threshold.

    The mean is over about the last tenth of the run so far, and never over much more than 1 / (1 − keep) batches.
    """

    k: int
    keep: float = 0.999
    fixed = True

    def buffers(self) -> dict[str, Tensor]:
        return {"floor": torch.zeros(()), "batches": torch.zeros((), dtype=torch.int64)}

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        pairs, value, _ = select.batch_top_k(x, encoder, self.k * len(x), 0.75 * float(own["floor"]))
        return pairs, value

    def learned(self, active: Active, scale: Tensor | None, own: Own) -> None:
        value = active.value.detach() if scale is None else active.value.detach() * active.at(scale)
        value = value[value > 0]
        if len(value):
            share = max(1 - self.keep, 10 / (10 + int(own["batches"])))
            own["floor"].lerp_(value.min(), share)
            own["batches"].add_(1)

    def active(self, pre: Tensor, pairs: Pairs | None, tokens: int, own: Own) -> Active:
        return Active(pre, pre.relu(), pairs, tokens)

    def gate(self, own: Own) -> gates.AnyGate:
        return gates.BatchTopK(self.k, float(own["floor"]))


@dataclass(frozen=True)
class AbsTopK(Gating):
    """The k largest in absolute value, signs kept."""

    k: int
    fixed = True

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        index, value = select.top_k(x, encoder, self.k, signed=True)
        return Pairs.fixed(index, len(encoder.w)), value.reshape(-1)

    def active(self, pre: Tensor, pairs: Pairs | None, tokens: int, own: Own) -> Active:
        return Active(pre, pre, pairs, tokens)

    def gate(self, own: Own) -> gates.AnyGate:
        return gates.AbsTopK(self.k)


@dataclass(frozen=True)
class GroupMax(Gating):
    """The largest of each of k groups of neighbours."""

    k: int
    fixed = True

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        index, value = select.group_max(x, encoder, self.k)
        return Pairs.fixed(index, len(encoder.w)), value.reshape(-1)

    def active(self, pre: Tensor, pairs: Pairs | None, tokens: int, own: Own) -> Active:
        return Active(pre, pre.relu(), pairs, tokens)

    def gate(self, own: Own) -> gates.AnyGate:
        return gates.GroupMax(self.k)


@dataclass(frozen=True)
class Relu(Gating):
    """Whatever is positive; a penalty makes it sparse."""

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        return select.above(x, encoder, 0.0)

    def active(self, pre: Tensor, pairs: Pairs | None, tokens: int, own: Own) -> Active:
        return Active(pre, pre.relu(), pairs, tokens)

    def gate(self, own: Own) -> gates.AnyGate:
        return gates.Relu()


@dataclass(frozen=True)
class JumpRelu(Gating):
    """What is above a learned threshold θ = exp(t), whose gradient is estimated from pairs within width / 2 of it.

    With K = 1 if |π − θ| < width / 2: dθ of the value is −θ/width · K and dθ of the step −1/width · K (Rajamanoharan
    et al. 2024, arXiv:2407.14435). With `to_input` the estimate reaches π as well, with the opposite sign (Anthropic,
    January 2025).
    """

    start: float = 0.01
    width: float = 0.05
    to_input: bool = False

    def parameters(self, n: int) -> dict[str, Tensor]:
        return {"log_threshold": torch.full((n,), self.start).log()}

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        return select.above(x, encoder, own["log_threshold"].detach().exp() - self.width / 2)

    def active(self, pre: Tensor, pairs: Pairs | None, tokens: int, own: Own) -> Active:
        theta = own["log_threshold"].exp()
        here = theta if pairs is None else theta.index_select(0, pairs.index)
        value, step = _Jump.apply(pre, here, self.width, self.to_input)  # type: ignore[misc]
        return Active(pre, value, pairs, tokens, {"step": step, "threshold": theta})

    def gate(self, own: Own) -> gates.AnyGate:
        return gates.JumpRelu(own["log_threshold"].detach().exp())


@dataclass(frozen=True)
class Gated(Gating):
    """A gate and a magnitude with one direction: exp(r) π + b_mag where π + b_gate > 0.

    The pairs are those of the open gate; its own loss reads ReLU(π + b_gate), which lives on the same pairs.
    """

    def parameters(self, n: int) -> dict[str, Tensor]:
        return {name: torch.zeros(n) for name in ("r_mag", "b_gate", "b_mag")}

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        return select.above(x, encoder, -own["b_gate"].detach())

    def active(self, pre: Tensor, pairs: Pairs | None, tokens: int, own: Own) -> Active:
        r, b_gate, b_mag = (
            t if pairs is None else t.index_select(0, pairs.index) for t in (own["r_mag"], own["b_gate"], own["b_mag"])
        )
        opened = (pre + b_gate).relu()
        value = (pre * r.exp() + b_mag).relu() * (opened > 0)
        return Active(pre, value, pairs, tokens, {"opened": opened})

    def gate(self, own: Own) -> gates.AnyGate:
        return gates.Gated(*(own[n].detach().clone() for n in ("r_mag", "b_gate", "b_mag")))


@dataclass(frozen=True)
class MatchingPursuit(Gating):
    """Greedy: k times the decoder row that explains most of what is left (Costa et al. 2025, arXiv:2506.03093)."""

    k: int
    fixed = True
    encodes = False

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        rest, index, value = x, [], []
        for _ in range(self.k):
            best, most = select.group_max(rest, encoder, 1)
            rest = torch.addcmul(rest, most, encoder.w[best[:, 0]], value=-1)
            index.append(best)
            value.append(most)
        return Pairs.fixed(torch.cat(index, 1), len(encoder.w)), torch.cat(value, 1).reshape(-1)

    def active(self, pre: Tensor, pairs: Pairs | None, tokens: int, own: Own) -> Active:
        return Active(pre, pre, pairs, tokens)

    def gate(self, own: Own) -> gates.AnyGate:
        return gates.MatchingPursuit(residual=0.0, steps=self.k, stop_on_repeat=False)


GATINGS: dict[str, type[Gating]] = {
    g.__name__: g for g in (TopK, BatchTopK, AbsTopK, GroupMax, Relu, JumpRelu, Gated, MatchingPursuit)
}


def gating_of(numbers: Mapping[str, Any]) -> Gating:
    """The gating that `as_dict` described.

    Raises:
        Refused: no gating of that kind.
    """
    if numbers.get("kind") not in GATINGS:
        raise Refused(f"gate {numbers.get('kind')!r}", "none has that name", f"use one of: {', '.join(GATINGS)}")
    return GATINGS[numbers["kind"]](**{n: v for n, v in numbers.items() if n != "kind"})


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
    """A few rows of each tensor at a time, with the thresholds; all at once where there is one number a pair."""
    if tensors[0].ndim == 1:
        yield (*tensors, theta)
        return
    for rows in zip(*(t.split(_ROWS) for t in tensors), strict=True):
        yield (*rows, theta)
