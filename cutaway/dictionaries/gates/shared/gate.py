"""The frozen gate: the contract of every gate, and what its settings and tensors are on disk.

With π the pre-activations of a block on one token, a gate says which latents are active and how strongly. Gates are
frozen data; what a gate has learned (thresholds, biases) are its tensors, with one number per latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.dictionaries.code import SparseCode


@dataclass(frozen=True, eq=False)
class Gate(ABC):  # noqa: B024 (the abstract method is that of the two kinds below)
    """The nonlinearity that turns a block's input into a code; a gate is an `EncoderGate` or a `GreedyGate`.

    The rest of the house asks a gate for the properties below and never for its class.

    Attributes:
        greedy: True if the gate reads with the decoder's rows and has no encoder.
        sets_number: True if the gate fixes how many latents are active on every token.
        norm_aware: True if latents may be compared in units of their decoder norms.
    """

    greedy: ClassVar[bool] = False
    sets_number: ClassVar[bool] = False
    norm_aware: ClassVar[bool] = True

    @property
    def whole_batch(self) -> bool:
        """True if a token's code depends on the other tokens of its batch."""
        return False

    def with_threshold(self, least: float) -> Gate:
        """Return the gate that encodes each token by itself, given the smallest value that the batch kept."""
        return self

    def per_latent(self, n_latents: int, dtype: torch.dtype, device: torch.device) -> Gate:
        """Return the same map with one threshold per latent, if the gate has a single one."""
        return self


class EncoderGate(Gate):
    """A gate on the pre-activations of an encoder."""

    @abstractmethod
    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        """Return the code of pre-activations; gradients flow to the active ones (and to biases the gate holds)."""

    def take(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        """Return the code of pre-activations, whose memory the gate may use again."""
        return self.apply(pre)


class GreedyGate(Gate):
    """A gate without encoder, which searches for a code with the decoder's rows."""

    greedy = True
    norm_aware = False

    @abstractmethod
    def pursue(self, x: Float[Tensor, "token width"], decoder: Float[Tensor, "latent width"]) -> SparseCode:
        """Return the code of inputs from which the bias has been subtracted."""


def tensors_of(gate: Gate) -> dict[str, Tensor]:
    """Return what a gate has learned, by field name."""
    values = {f.name: getattr(gate, f.name) for f in fields(gate)}
    return {n: v for n, v in values.items() if isinstance(v, Tensor)}


def numbers_of(gate: Gate) -> dict[str, Any]:
    """Return a gate's kind and settings, ready for JSON."""
    values = {f.name: getattr(gate, f.name) for f in fields(gate)}
    return {"kind": type(gate).__name__} | {n: v for n, v in values.items() if not isinstance(v, Tensor)}


def moved(gate: Gate, device: torch.device | str | None, dtype: torch.dtype | None) -> Gate:
    """Return the gate on another device or in another dtype; its tensors are never coarser than float32."""
    dtype = None if dtype is None else torch.promote_types(dtype, torch.float32)
    return replace(gate, **{n: t.to(device, dtype) for n, t in tensors_of(gate).items()})


def positive(gate: Gate, k: int) -> None:
    """Refuse a number of active latents below 1."""
    if k < 1:
        raise Refused(f"{type(gate).__name__}(k={k})", "nothing would ever be active", "choose k ≥ 1")


def within(gate: Gate, k: int, pre: Tensor) -> int:
    """Return k, which may not be more than the number of latents."""
    if k > pre.shape[1]:
        raise Refused(f"{type(gate).__name__}(k={k})", f"there are {pre.shape[1]} latents", "choose a smaller k")
    return k
