"""Reads among edits: what stands at an earlier place is kept for an edit of a later one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from cutaway.core.address import Address, parse
from cutaway.core.sites import SITES
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.edits.edit import Edit

_ORDER = {row.name: n for n, row in enumerate(SITES)}


@runtime_checkable
class Keeper(Protocol):
    """Edit, or use of one, that needs at a written site what stands at an earlier one."""

    def keep(self, site: str, x: Tensor, frame: ForwardFrame) -> None:
        """Keep what stands at a read site."""

    def identity(self) -> str:
        """Return a hash of all that distinguishes it."""
        ...


@dataclass(frozen=True, eq=False)
class Read(Edit):
    """The part of an edit that keeps what stands at a read site, and leaves it as it is."""

    local: ClassVar[bool] = False
    address: str
    use: Keeper
    positions: tuple[int, ...] | None = None

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        self.use.keep(self.address, x, frame)
        return x


def time_of(site: str | Address) -> tuple[float, int]:
    """Return a key that sorts sites in the order of the forward."""
    a: Any = parse(site)
    early = -1.0 if a.site in ("embed", "pos_embed") else float("inf")
    return (early if a.layer is None else float(a.layer), _ORDER[a.site])
