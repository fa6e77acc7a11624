"""A user's own function as an edit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.edits.edit import Edit, at_places

USER_FUNCTION = "user function"  # how records name what only the user's code defines


@dataclass(frozen=True, eq=False, repr=False)
class Apply(Edit):
    """Call a function on the activation, and go on with the tensor that it returns.

    Use it for a change that no other edit expresses. The function runs eagerly inside the forward, so `breakpoint()`
    and `print` work in it. It gets a copy of the values, [batch, …] with the addressed position and unit axes selected
    away (without a position: every column, padding included), and must return a tensor of the same shape, dtype and
    device. It may read all prompts of the batch at once: a plan never divides them. Nothing can tell when its value
    changes, so a sweep that is kept in a file refuses it.

        model.run(prompt, edits=Apply("resid_post.3", torch.relu))

    Attributes:
        address: the place, optionally with a unit and a position.
        function: maps the values there to their replacement.
        positions: several positions, in place of one in the address; the function is called once for each.
    """

    local: ClassVar[bool] = False
    whole_batch: ClassVar[bool] = True
    address: Address | str
    function: Callable[[Tensor], Tensor] = field(repr=False)
    positions: tuple[int, ...] | None = None

    @property
    def _what(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"{USER_FUNCTION} {name} at {self.where}"

    def __repr__(self) -> str:
        return f"Apply({self._what}{'' if self.positions is None else f', positions={self.positions}'})"

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        return at_places(self, x, frame, self._returned)

    def _returned(self, old: Tensor) -> Tensor:
        new: Any = self.function(old.clone())
        if not isinstance(new, Tensor):
            raise Refused(
                self._what, f"it returns {type(new).__name__}", "return the new tensor, also after a change in place"
            )
        given, wanted = ((tuple(t.shape), t.dtype, t.device) for t in (new, old))
        if given != wanted:
            (shape, dtype, device), (own_shape, own_dtype, own_device) = given, wanted
            why = f"it returns {dtype} {shape} on {device} for {own_dtype} {own_shape} on {own_device}"
            raise Refused(self._what, why, "return a tensor of the shape, dtype and device that it gets")
        return new

    def identity(self) -> str:
        """Refuse to be identified, as files of sweeps require.

        Raises:
            Refused: always.
        """
        raise Refused(
            f"{self._what} in a sweep that is kept", "its value may change without notice", "sweep without resume"
        )
