"""Gates: from pre-activations to the active latents.

With π the pre-activations of a block on one token, each gate says which latents are active and how much. Gates are
frozen data; what a gate learns (thresholds, biases) are its tensors, one number a latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.dictionaries.code import SparseCode


@dataclass(frozen=True, eq=False)
class Gate(ABC):
    """How pre-activations become a code."""

    @abstractmethod
    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        """The code of pre-activations; gradients flow to the active ones (and to biases the gate holds)."""

    @property
    def whole_batch(self) -> bool:
        """Whether a token's code depends on the other tokens of its batch."""
        return False


@dataclass(frozen=True, eq=False)
class Relu(Gate):
    """f = max(π, 0) (Bricken et al. 2023)."""

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        return SparseCode.from_dense(pre.relu())


@dataclass(frozen=True, eq=False)
class JumpRelu(Gate):
    """f = π where π > θ, with one θ a latent (Rajamanoharan et al. 2024, arXiv:2407.14435).

    A latent with θ < 0 passes what is positive only, unless `signed`: then it passes negative values above θ as well.
    """

    threshold: Float[Tensor, "latent"]
    signed: bool = False

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        passed = pre if self.signed else pre.relu()
        return SparseCode.from_dense(passed * (pre > self.threshold))


@dataclass(frozen=True, eq=False)
class TopK(Gate):
    """f = max(π, 0) on the k largest π of each token (Gao et al. 2024, arXiv:2406.04093).

    `multi` tells training to add the loss of the 4 k largest, weighted 1/8; the code is the same. With `signed`, f = π:
    negative values pass where fewer than k are positive.
    """

    k: int
    multi: bool = False
    signed: bool = False

    def __post_init__(self) -> None:
        _positive(self, self.k)

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        value, index = pre.topk(_within(self, self.k, pre), dim=1, sorted=False)
        return SparseCode(index, value if self.signed else value.relu(), pre.shape[1])


@dataclass(frozen=True, eq=False)
class BatchTopK(Gate):
    """The k · tokens largest max(π, 0) of the batch; with a `threshold`, π where π > threshold instead.

    (Bussmann et al. 2024, arXiv:2412.06410.) The threshold is what training found the smallest kept value to be; with
    it a token's code does not depend on its batch.
    """

    k: int
    threshold: float | None = None

    def __post_init__(self) -> None:
        _positive(self, self.k)

    @property
    def whole_batch(self) -> bool:
        return self.threshold is None

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        kept = pre.relu()
        if self.threshold is not None:
            return SparseCode.from_dense(kept * (pre > self.threshold))
        flat = kept.reshape(-1)
        entry = flat.topk(_within(self, self.k, pre) * len(pre), sorted=False).indices
        value = flat[entry]
        active = value != 0
        entry = entry[active]
        n = pre.shape[1]
        return SparseCode.of_entries(entry // n, entry % n, value[active], (len(pre), n))


@dataclass(frozen=True, eq=False)
class Gated(Gate):
    """f = max(exp(r) π + b_mag, 0) where π + b_gate > 0 (Rajamanoharan et al. 2024, arXiv:2404.16014).

    Here π is the shared linear part, W_e (x − p).
    """

    r_mag: Float[Tensor, "latent"]
    b_gate: Float[Tensor, "latent"]
    b_mag: Float[Tensor, "latent"]

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        magnitude = (pre * self.r_mag.exp() + self.b_mag).relu()
        return SparseCode.from_dense(magnitude * (pre + self.b_gate > 0))


@dataclass(frozen=True, eq=False)
class AbsTopK(Gate):
    """f = π, its sign kept, on the k largest |π| of each token."""

    k: int

    def __post_init__(self) -> None:
        _positive(self, self.k)

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        index = pre.abs().topk(_within(self, self.k, pre), dim=1, sorted=False).indices
        return SparseCode(index, pre.gather(1, index), pre.shape[1])


@dataclass(frozen=True, eq=False)
class GroupMax(Gate):
    """f = max(π, 0) on the largest π of each of k groups of neighbouring latents."""

    k: int

    def __post_init__(self) -> None:
        _positive(self, self.k)

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        n = pre.shape[1]
        if n % self.k:
            raise Refused(f"GroupMax(k={self.k})", f"{n} latents do not fall into {self.k} equal groups", "choose k")
        value, index = pre.unflatten(1, (self.k, -1)).max(-1)
        starts = torch.arange(0, n, n // self.k, device=pre.device)
        return SparseCode(index + starts, value.relu(), n)


@dataclass(frozen=True, eq=False)
class MatchingPursuit:
    """Greedy: take the decoder row that explains most of what is left, subtract it, and go on.

    There is no encoder. Each step adds max_i ⟨residual, W_d,i⟩ (at least 0) to its latent, for at most `steps` steps
    (None: no limit) and until a token's residual norm is below `residual` or, with `stop_on_repeat`, a step adds no new
    latent. (Costa et al. 2025, arXiv:2506.03093.)
    """

    residual: float = 1e-2
    steps: int | None = None
    stop_on_repeat: bool = True

    @property
    def whole_batch(self) -> bool:
        """Every token is encoded by itself."""
        return False

    def pursue(self, x: Float[Tensor, "token width"], decoder: Float[Tensor, "latent width"]) -> SparseCode:
        """The code of inputs from which the bias has been subtracted.

        Raises:
            Refused: neither a limit of steps nor a stop at repeats, so that it might never end.
        """
        if self.steps is None and not self.stop_on_repeat:
            raise Refused("MatchingPursuit", "nothing bounds its steps", "give steps=, or stop_on_repeat=True")
        code = x.new_zeros(len(x), len(decoder))
        rest, live = x, torch.ones(len(x), dtype=torch.bool, device=x.device)
        step = 0
        while bool(live.any()) and (self.steps is None or step < self.steps):
            value, index = (rest @ decoder.T).relu().max(1)
            value = value * live
            new = (code.gather(1, index[:, None])[:, 0] == 0) & (value != 0)
            code = code.scatter_add(1, index[:, None], value[:, None])
            rest = rest - value[:, None] * decoder[index]
            live = live & ~(rest.norm(dim=1) < self.residual)
            if self.stop_on_repeat:
                live = live & new
            step += 1
        return SparseCode.from_dense(code)


AnyGate = Gate | MatchingPursuit
GATES: dict[str, Any] = {
    g.__name__: g for g in (Relu, JumpRelu, TopK, BatchTopK, Gated, AbsTopK, GroupMax, MatchingPursuit)
}


def tensors_of(gate: AnyGate) -> dict[str, Tensor]:
    """What a gate has learned, by field name."""
    values = {f.name: getattr(gate, f.name) for f in fields(gate)}
    return {n: v for n, v in values.items() if isinstance(v, Tensor)}


def numbers_of(gate: AnyGate) -> dict[str, Any]:
    """A gate's kind and settings, ready for JSON."""
    values = {f.name: getattr(gate, f.name) for f in fields(gate)}
    return {"kind": type(gate).__name__} | {n: v for n, v in values.items() if not isinstance(v, Tensor)}


def gate_of(numbers: dict[str, Any], tensors: dict[str, Tensor]) -> AnyGate:
    """The gate that `numbers_of` and `tensors_of` described.

    Raises:
        Refused: no gate of that kind.
    """
    kind = numbers.get("kind")
    if kind not in GATES:
        raise Refused(f"gate {kind!r}", "no gate has that name", f"use one of: {', '.join(GATES)}")
    return GATES[kind](**{n: v for n, v in numbers.items() if n != "kind"}, **tensors)


def moved(gate: AnyGate, device: torch.device | str | None, dtype: torch.dtype | None) -> AnyGate:
    """The gate with its tensors elsewhere, or in another dtype; thresholds are never coarser than float32."""
    dtype = None if dtype is None else torch.promote_types(dtype, torch.float32)
    return replace(gate, **{n: t.to(device, dtype) for n, t in tensors_of(gate).items()})


def chosen(gate: AnyGate, latents: Tensor) -> AnyGate:
    """The gate of some of the latents, for gates that judge every latent by itself."""
    return replace(gate, **{n: t[latents] for n, t in tensors_of(gate).items()})


def _positive(gate: Gate, k: int) -> None:
    if k < 1:
        raise Refused(f"{type(gate).__name__}(k={k})", "nothing would ever be active", "choose k ≥ 1")


def _within(gate: Gate, k: int, pre: Tensor) -> int:
    if k > pre.shape[1]:
        raise Refused(f"{type(gate).__name__}(k={k})", f"there are {pre.shape[1]} latents", "choose a smaller k")
    return k
