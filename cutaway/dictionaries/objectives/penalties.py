"""Penalties that make codes sparse: formulas on the active pairs, with f a value and n its latent's decoder norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.dictionaries.objectives.term import Part, Pass, Term

Norms = Literal["together", "sum", "none"]


@dataclass(frozen=True)
class L1(Term):
    """Σ f n (Anthropic, April 2024), or Σ f with norms "none" (Bricken et al. 2023); "sum" adds norms over sites.

    With `power` below 1, Σ f^power; with `anneal`, the power goes from 1 to `power` over that share of the run, from
    the end of the weight's rise on (p-annealing: Karvonen et al. 2024, arXiv:2408.00113).
    """

    weight: float
    rise: float = 0.05
    norms: Norms = "together"
    power: float = 1.0
    anneal: float = 0.0

    def of(self, p: Pass) -> Tensor:
        power = self.power_at(p.done)
        if power != 1:
            return _each(p, lambda part: _powered(_sized(part, self.norms), power))
        return sum((self._plain(part) for part in p.parts), torch.zeros(()))

    def power_at(self, done: float) -> float:
        """Return the power at a share of the run."""
        if self.anneal <= 0:
            return self.power
        return 1 + (self.power - 1) * min(1.0, max(0.0, (done - self.rise) / self.anneal))

    def _plain(self, part: Part) -> Tensor:
        """Σ f n by way of Σ f of each latent: one pass over the values."""
        norms = part.norms(self.norms)
        sums = part.active.by_latent(part.active.value, len(part.b_enc))
        return part.across.latents((sums if norms is None else sums * norms).sum()) / part.active.tokens


@dataclass(frozen=True)
class Tanh(Term):
    """Σ tanh(c f n) (Anthropic, January 2025): a smooth count."""

    weight: float
    rise: float = 1.0
    c: float = 4.0
    norms: Norms = "together"

    def of(self, p: Pass) -> Tensor:
        return _each(p, lambda part: torch.tanh(self.c * _sized(part, self.norms)))


@dataclass(frozen=True)
class L0(Term):
    """The number of active latents, through the step's estimated gradient (JumpReLU only)."""

    needs: ClassVar[str | None] = "step"
    weight: float
    rise: float = 0.1

    def of(self, p: Pass) -> Tensor:
        return sum((_steps(part) for part in p.parts), torch.zeros(()))


@dataclass(frozen=True)
class L0Target(Term):
    """(L0 / target − 1)² of each block, through the step's estimated gradient (JumpReLU only; Gemma Scope 2)."""

    needs: ClassVar[str | None] = "step"
    weight: float
    target: float
    rise: float = 0.1

    def of(self, p: Pass) -> Tensor:
        return sum(((part.across.tokens(_steps(part)) / self.target - 1) ** 2 for part in p.parts), torch.zeros(()))


@dataclass(frozen=True)
class Frequency(Term):
    """Σ_i φ_i (1 + φ_i / scale), φ_i the mean of tanh(c f n) over tokens: dense latents pay more than their share."""

    weight: float
    rise: float = 0.1
    scale: float = 0.01
    c: float = 4.0
    norms: Norms = "together"

    def of(self, p: Pass) -> Tensor:
        def one(part: Part) -> Tensor:
            soft = torch.tanh(self.c * _sized(part, self.norms))
            phi = part.across.tokens(part.active.by_latent(soft, len(part.b_enc)) / part.active.tokens)
            return part.across.latents((phi * (1 + phi / self.scale)).sum())

        return sum((one(part) for part in p.parts), torch.zeros(()))


@dataclass(frozen=True)
class PreActivation(Term):
    """Σ ReLU(θ − π) n over the latents that are not active, which brings back those that never are.

    (Anthropic, January 2025.) With `silent_only`, only latents silent for `silent_after` tokens pay (None: as for
    `AuxK`). The sum over what is inactive is the sum over everything, which needs Σ x alone, less that over the active.
    """

    needs: ClassVar[str | None] = "threshold"
    weight: float = 3e-6
    rise: float = 0.0
    silent_only: bool = False
    silent_after: int | None = None

    def of(self, p: Pass) -> Tensor:
        after = self.silent_after or p.silent_after
        return sum((part.across.latents(self._of(part, after)) for part in p.parts), torch.zeros(()))

    def _of(self, part: Part, after: int) -> Tensor:
        active = part.active
        theta = active.more.get("threshold", torch.zeros_like(part.b_enc))
        pays = torch.ones_like(part.b_enc)
        if self.silent_only:
            pays = (part.silent >= after).to(pays.dtype)
        norms = part.norms()
        pays = pays if norms is None else pays * norms
        if active.pairs is None:
            return ((theta - active.pre).relu() * pays).sum() / active.tokens
        x = part.x if part.p is None else part.x - part.p
        sums = part.w_enc @ x.sum(0) + active.tokens * part.b_enc
        gap = active.pre - active.at(theta)
        inside = (gap.relu() * active.at(pays)).sum()  # θ − π is −gap there, and ReLU would have made it 0
        return (((active.tokens * theta - sums) * pays).sum() + inside) / active.tokens


def _sized(part: Part, kind: Norms) -> Tensor:
    norms = part.norms(kind)
    f = part.active.value.abs()
    return f if norms is None else f * part.active.at(norms)


def _powered(size: Tensor, power: float) -> Tensor:
    on = size > 0  # the slope of a power below 1 is infinite at 0
    return torch.where(on, torch.where(on, size, 1.0).pow(power), 0.0)


def _each(p: Pass, formula) -> Tensor:  # type: ignore[no-untyped-def]
    return sum((part.across.latents(formula(part).sum()) / part.active.tokens for part in p.parts), torch.zeros(()))


def _steps(part: Part) -> Tensor:
    if "step" not in part.active.more:
        why = "it counts through the estimated gradient of a threshold, and this gate has none"
        raise Refused("an L0 objective", why, "use the gate JumpRelu, or the penalty L1 or Tanh")
    return part.across.latents(part.active.more["step"].sum()) / part.active.tokens
