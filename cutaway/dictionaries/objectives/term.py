"""Terms of an objective, and the pass of a batch that they read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from cutaway.dictionaries.kernels.reduce import ALONE, Across
from cutaway.dictionaries.objectives.active import Active


@dataclass(frozen=True, eq=False)
class Part:
    """A block in one pass: what it read and is to write, its weights, and how long its latents have been silent."""

    x: Tensor  # [token, widths of the reads]
    p: Tensor | None  # what is subtracted from x
    target: Tensor  # [token, widths of the writes], of this block's sites alone
    out: Tensor  # the reconstruction of these sites, by all blocks
    own: Tensor  # this block's share of it
    active: Active
    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    widths: tuple[int, ...]  # of the sites written
    silent: Tensor  # [latent], tokens since it was active
    unit: bool  # decoder rows are kept at norm one
    across: Across = ALONE  # the latents are a shard of all, the tokens a part, where several processes train

    def norms(self, kind: Literal["together", "sum", "none"] = "together") -> Tensor | None:
        """Return the norms of the decoder rows: over all sites together, or added over the sites; None where they
        are one.
        """
        if kind == "none" or (self.unit and kind == "together"):
            return None
        if kind == "together":
            return self.w_dec.norm(dim=1)
        parts = [w.norm(dim=1) for w in self.w_dec.split(self.widths, dim=1)]
        return sum(parts[1:], parts[0])


@dataclass(frozen=True, eq=False)
class Pass:
    """A batch through the dictionary that is trained."""

    parts: Sequence[Part]
    outs: Mapping[str, Tensor]  # reconstruction by site, in the site's own units
    nested: Sequence[Sequence[Tensor]] = ()  # for each part, its reconstruction from each prefix, the whole last
    silent_after: int = 10_000_000  # tokens after which a latent counts as silent, where a term does not say
    variance: float = 1.0  # mean squared distance of targets from their mean, a constant of the run
    done: float = 1.0  # share of the run
    batch: Any = None  # the stream's own batch, for terms that run the model
    xs: Mapping[str, Tensor] = field(default_factory=dict)  # activations by site, in the dictionary's units
    ys: Mapping[str, Tensor] = field(default_factory=dict)  # their reconstructions, by site written


class Term(ABC):
    """A term of the objective: `weight` times `of`, the weight growing from zero over the first `rise` of the run.

    Attributes:
        needs: the quantity that the gate must offer (`TrainGate.offers`) for the term to be defined, if any.
    """

    needs: ClassVar[str | None] = None
    weight: float
    rise: float

    @abstractmethod
    def of(self, p: Pass) -> Tensor:
        """Return the term of a batch, a mean over tokens, differentiable."""

    def now(self, done: float) -> float:
        """Return the weight at a share of the run."""
        return self.weight * (min(1.0, done / self.rise) if self.rise > 0 else 1.0)

    def as_dict(self) -> dict[str, Any]:
        """Return the kind and numbers, ready for JSON."""
        return {"kind": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]
