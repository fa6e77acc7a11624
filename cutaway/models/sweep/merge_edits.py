"""Edits at the end of a block, made where the next block begins.

What leaves block l enters block l + 1 unchanged, and what the MLP adds comes last in a block. So an edit of
`resid_post.l` is the same edit of the stream that enters l + 1, and an edit of `mlp_out.l` adds its difference there:
block l itself need not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.edits.edit import Edit
from cutaway.models.model import Model
from cutaway.models.sweep.plan import RESUME

_LAST = ("mlp_out", "resid_post")  # what stands at the end of a block, in order


@dataclass
class Added:
    """Outputs of the MLPs of some layers in the run that variants start from; filled once that run is done."""

    values: dict[int, Float[Tensor, "batch position d_model"]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Deferred(Edit):
    """Edits of `mlp_out` and `resid_post` of one block, made on the stream that enters the next."""

    address: Address
    edits: tuple[Edit, ...]
    added: Added
    positions: tuple[int, ...] | None = None

    def places(self) -> list[int | None]:
        return [p for e in self.edits for p in e.places()]

    @property
    def since(self) -> int:  # type: ignore[override]
        return min(e.since for e in self.edits)

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        assert self.address.layer is not None
        written = [e for e in self.edits if e.where.site == "mlp_out"]
        if written:
            low = frame.offset
            old = new = self.added.values[self.address.layer - 1][:, low : low + x.shape[1]]
            for e in written:
                new = e.apply(new, frame)
            x = x + (new - old)
        for e in self.edits:
            if e.where.site == "resid_post":
                x = e.apply(x, frame)
        return x


def defer(
    model: Model, base: Sequence[Edit], variant: Sequence[Edit], first: int, added: Added
) -> tuple[Sequence[Edit], int]:
    """Defer the edits of a variant's first block to the next one, where that is exact; return it and its start.

    Where other edits act at these two places, everything stays, so that they keep their order. Differences of what an
    MLP writes are added in float32 or wider only, where that rounds no more than the model does.
    """
    here = [e for e in variant if e.where.layer == first]
    sites = {e.where.site for e in here}
    fits = (
        RESUME not in model.disabled
        and first + 1 < model.shape.n_layers
        and sites
        and sites <= set(_LAST)
        and all(e.local for e in variant)
    )
    if "mlp_out" in sites:
        exact = model.dtype in (torch.float32, torch.float64) and not model.family.post_norm
        fits = fits and exact
    touched = {(e.where.site, e.where.layer) for e in base}
    if not fits or touched & {*((s, first) for s in _LAST), ("resid_pre", first + 1)}:
        return variant, first
    moved = Deferred(Address("resid_pre", first + 1), tuple(here), added)
    return [moved, *(e for e in variant if e.where.layer != first)], first + 1


def layers_added(variants: Sequence[Sequence[Edit]]) -> list[int]:
    """Return the layers whose MLP output deferred edits need."""
    moved = [e for v in variants for e in v if isinstance(e, Deferred)]
    needed = {(e.address.layer or 0) - 1 for e in moved if any(w.where.site == "mlp_out" for w in e.edits)}
    return sorted(needed)
