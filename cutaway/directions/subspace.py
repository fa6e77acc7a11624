"""Subspaces: orthonormal directions of one site, exchanged between runs, projected out, and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.result import Result, open_result
from cutaway.directions.direction import Direction, direction
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Add, Project

NO_MEASUREMENT: dict[str, str] = dict.fromkeys(("basis", "apart"), "a subspace is no measurement")


@dataclass(frozen=True, kw_only=True)
class Subspace(Result, kind="subspace"):
    """Orthonormal directions at an address that carry a variable together; of rank 1 it is a direction.

    Attributes:
        basis: the directions, in columns.
        apart: the distance of the two classes along the first one, where a task has two.
        address: the place.
        positions: the positions at which it was found: last, changed, subject or all.
        positive: of two classes, the one that the first direction points to.
        negative: the one that it points away from.
        name: the task that it was found on.
        family: the family of the model.
    """

    basis: Float[Tensor, "width rank"]
    apart: Float[Tensor, ""] | None = None
    address: str
    positions: str = ""
    positive: str = ""
    negative: str = ""
    name: str = ""
    family: str = ""

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return self.basis.shape[1]

    def swap(
        self, source: Float[Tensor, "width"] | Float[Tensor, "batch width"], positions: Sequence[int] | None = None
    ) -> list[Edit]:
        """Set the coordinates within the subspace to those of a source: h + (source − h) R Rᵀ."""
        inside = source @ self.basis.to(source.device) @ self.basis.T.to(source.device)
        where = None if positions is None else tuple(positions)
        inside = inside[:, None] if where is None and inside.ndim == 2 else inside
        return [*self.project_out(positions), Add(self.address, inside, positions=where)]

    def project_out(self, positions: Sequence[int] | None = None) -> list[Edit]:
        """Remove the components within the subspace."""
        return [Project(self.address, self.basis.T, positions=None if positions is None else tuple(positions))]

    def direction(self) -> Direction:
        """Return the subspace of rank 1 as a direction, as long as the classes are apart along it.

        Raises:
            Refused: it has several dimensions.
        """
        if self.rank != 1:
            raise Refused(f"a direction of a subspace of rank {self.rank}", "it is no line", "use its basis or edits")
        length = 1.0 if self.apart is None else float(self.apart)
        return direction(
            {self.address: length * self.basis[:, 0]}, self.name, self.positive, self.negative, self.family
        )


def open_subspace(path: str | Path) -> Subspace:
    """Open a subspace of a file: one that was saved, what `directions.das` saved, or a direction of one address.

    Raises:
        Refused: no such file, or one that holds no subspace.
    """
    found = open_result(Path(path).expanduser())
    if isinstance(found, Subspace):
        return found
    own = getattr(found, "subspace", None)
    if own is not None:
        return own()
    if isinstance(found, Direction) and len(found.vector) == 1:
        unit, (place,) = found.unit(), found.places
        return Subspace(
            basis=unit.vector.T.contiguous(),
            apart=found.norm[0],
            address=str(place),
            positive=found.positive,
            negative=found.negative,
            name=found.name,
            family=found.family,
            reasons=NO_MEASUREMENT,
        )
    raise Refused(f"file {str(path)!r}", f"it holds a {found.kind}", "give the file of a subspace")
