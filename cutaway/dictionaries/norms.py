"""Normalisations of what a dictionary reads and writes.

`into` brings activations into the dictionary's space, `back` brings its output into the site's. A fixed normalisation
is an affine map and can be folded into the weights; one that measures every token cannot, and hands what it measured
from `into` to `back`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused

Measured = tuple[Tensor, ...]  # per-token numbers, each [token, 1]


class Norm(ABC):
    """The normalisation of one site."""

    per_token: bool

    @abstractmethod
    def into(self, x: Float[Tensor, "token width"]) -> tuple[Float[Tensor, "token width"], Measured]:
        """Return the activations in the dictionary's space, and what was measured on each token."""

    @abstractmethod
    def back(self, y: Float[Tensor, "token width"], measured: Measured) -> Float[Tensor, "token width"]:
        """Return a reconstruction in the site's own space."""


class FixedNorm(Norm):
    """An affine normalisation: the same for every token, so it can be folded."""

    per_token = False

    @abstractmethod
    def pull(self, rows: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """Return the rows that read the raw activations as `rows` read the normalised ones, but for the origin."""

    @abstractmethod
    def push(self, rows: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """Return the rows in the site's space, but for the origin."""

    @property
    @abstractmethod
    def origin(self) -> Tensor | float:
        """The activation that becomes zero."""

    def into(self, x: Float[Tensor, "token width"]) -> tuple[Float[Tensor, "token width"], Measured]:
        return self.push_in(x - self.origin), ()

    def back(self, y: Float[Tensor, "token width"], measured: Measured) -> Float[Tensor, "token width"]:
        return self.push(y) + self.origin

    @abstractmethod
    def push_in(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """Take centred activations to the dictionary's space."""


@dataclass(frozen=True, eq=False)
class Scale(FixedNorm):
    """x · factor; with factor √width / E‖x‖, activations get the mean norm √width."""

    factor: float

    def __post_init__(self) -> None:
        if not (0 < self.factor < float("inf")):
            raise Refused(f"Scale({self.factor})", "it cannot be undone", "give a positive factor")

    @property
    def origin(self) -> float:
        return 0.0

    def push_in(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        return x * self.factor

    def pull(self, rows: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        return rows * self.factor

    def push(self, rows: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        return rows / self.factor


@dataclass(frozen=True, eq=False)
class Whitening(FixedNorm):
    """(x − mean) · matrix; `inverse` undoes the matrix. Centring, scales of dimensions, covariance whitening."""

    mean: Float[Tensor, "width"]
    matrix: Float[Tensor, "width width"]
    inverse: Float[Tensor, "width width"]

    def __post_init__(self) -> None:
        unit = torch.eye(len(self.mean), device=self.mean.device, dtype=torch.float64)
        off = (self.matrix.double() @ self.inverse.double() - unit).abs().max()
        if not bool(off < 1e-3):
            raise Refused("Whitening", f"matrix · inverse differs from 1 by {float(off):.2g}", "give the exact inverse")

    @property
    def origin(self) -> Tensor:
        return self.mean

    def push_in(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        return x @ self.matrix

    def pull(self, rows: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        return rows @ self.matrix.T

    def push(self, rows: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        return rows @ self.inverse


@dataclass(frozen=True, eq=False)
class TokenNorm(Norm):
    """x · √width / ‖x‖ on every token; the output is multiplied by ‖x‖ / √width of its input."""

    per_token = True

    def into(self, x: Float[Tensor, "token width"]) -> tuple[Float[Tensor, "token width"], Measured]:
        factor = x.shape[1] ** 0.5 / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
        return x * factor, (factor,)

    def back(self, y: Float[Tensor, "token width"], measured: Measured) -> Float[Tensor, "token width"]:
        return y / measured[0]


@dataclass(frozen=True, eq=False)
class TokenLayerNorm(Norm):
    """(x − mean) / (std + ε) on every token, std unbiased; the output is multiplied by std and the mean added."""

    eps: float = 1e-5
    per_token = True

    def into(self, x: Float[Tensor, "token width"]) -> tuple[Float[Tensor, "token width"], Measured]:
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        return (x - mean) / (std + self.eps), (std, mean)

    def back(self, y: Float[Tensor, "token width"], measured: Measured) -> Float[Tensor, "token width"]:
        return y * measured[0] + measured[1]


@dataclass(frozen=True, eq=False)
class TokenMean(Norm):
    """x − mean on every token, the mean over its width; the output gets the mean of its input back."""

    per_token = True

    def into(self, x: Float[Tensor, "token width"]) -> tuple[Float[Tensor, "token width"], Measured]:
        mean = x.mean(1, keepdim=True)
        return x - mean, (mean,)

    def back(self, y: Float[Tensor, "token width"], measured: Measured) -> Float[Tensor, "token width"]:
        return y + measured[0]


NORMS: dict[str, Any] = {n.__name__: n for n in (Scale, Whitening, TokenNorm, TokenLayerNorm, TokenMean)}


def moved_norm(norm: Norm, device: torch.device | str | None, dtype: torch.dtype | None) -> Norm:
    """Return the normalisation on another device or in another dtype."""
    values = {f.name: getattr(norm, f.name) for f in fields(norm)}  # type: ignore[arg-type]
    moved = {k: v.to(device, dtype) for k, v in values.items() if isinstance(v, Tensor)}
    return replace(norm, **moved)  # type: ignore[type-var]


def same(a: Norm | None, b: Norm | None) -> bool:
    """Return True if two normalisations are the same map."""
    if type(a) is not type(b) or a is None or b is None:
        return a is b
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]  # type: ignore[arg-type]
    return all(torch.equal(v, w) if isinstance(v, Tensor) else v == w for v, w in pairs)
