"""Circuits of nodes in a running model: every node of the complement stands at a fixed value.

At each submodule x = f W_dec + b_dec + ε becomes f' W_dec + b_dec + ε', where a latent or error in the circuit is what
the changed stream makes of it, and one outside is its value at this position of a baseline (Marks et al. 2024,
arXiv:2403.19647: the mean over corrupt prompts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.record import hash_tensors, hash_text
from cutaway.graphs.submodules import Submodule
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.keep import Read
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound

BaselineKind = Literal["corrupt_mean", "clean_mean", "zero"]
BASELINES: dict[str, str] = {
    "corrupt_mean": "the mean at each position over the corrupt prompts of the same length",
    "clean_mean": "the mean at each position over the clean prompts of the same length",
    "zero": "zeros of latents and errors, which leave b_dec",
}


@dataclass(frozen=True, eq=False)
class Baseline:
    """Values of a submodule's nodes outside of circuits, for prompts of one length."""

    sub: Submodule
    latents: Float[Tensor, "position latent"]
    error: Float[Tensor, "position width"]


def baselines(model: Model, subs: Sequence[Submodule], bound: Bound, how: BaselineKind) -> list[Baseline]:
    """Return the values outside of circuits for prompts of one length, without padding."""
    prompts = bound.clean if how == "clean_mean" else bound.corrupt
    acts = model.capture(prompts, list(dict.fromkeys(a for s in subs for a in (s.read, s.site))), logits=False)
    out = []
    for s in subs:
        codes = s.codes(acts[str(s.read)])
        latents, error = codes.mean(0), s.error(codes, acts[str(s.site)]).mean(0)
        zero = 0.0 if how == "zero" else 1.0
        out.append(Baseline(s, latents * zero, error * zero))
    return out


@dataclass(frozen=True, eq=False)
class AblateComplement(Edit):
    """Edit that ablates the nodes outside of a circuit, at one submodule: they stand at their baseline.

    Attributes:
        baseline: the submodule and the values.
        kept: True at the latents in the circuit.
        error: True if the error is in it.
    """

    local: ClassVar[bool] = False
    baseline: Baseline = field(repr=False)
    kept: Bool[Tensor, "latent"] = field(repr=False)
    error: bool
    positions: tuple[int, ...] | None = None

    @property
    def address(self) -> Address:  # type: ignore[override]
        return self.baseline.sub.site

    @property
    def begins(self) -> Address:
        return self.baseline.sub.read

    def parts(self) -> tuple[Edit, ...]:
        return (self,) if self.begins == self.where else (Read(str(self.begins), self), self)

    def keep(self, site: str, x: Tensor, frame: ForwardFrame) -> None:
        """Keep what stands at the read site."""
        frame.scratch[self] = x

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        sub, n = self.baseline.sub, x.shape[1]
        f = sub.codes(frame.scratch.pop(self, x))
        inside = torch.where(self.kept.to(x.device), f, self.baseline.latents[-n:])
        if self.error:
            new = x.flatten(2).to(f) + (inside - f) @ sub.decoder
        else:
            new = inside @ sub.decoder + sub.dictionary.b_dec[str(sub.site)].to(f) + self.baseline.error[-n:]
        return new.reshape(x.shape).to(x.dtype)

    def identity(self) -> str:
        """Hash all that distinguishes this edit, for the files of sweeps."""
        b = self.baseline
        tensors = {"kept": self.kept, "latents": b.latents, "error": b.error}
        return hash_text(b.sub.dictionary.fingerprint(), hash_tensors(tensors), repr(self))


def ablate_complement(stands: Sequence[Baseline], kept: Bool[Tensor, "node"]) -> list[Edit]:
    """Return the edits that leave only these nodes, of all positions, of each submodule latents and then the error."""
    out, start = list[Edit](), 0
    for b in stands:
        mine = kept[start : start + b.sub.n_latents + 1]
        start += len(mine)
        out.append(AblateComplement(b, mine[:-1], bool(mine[-1])))
    return out
