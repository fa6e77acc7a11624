"""Conditional edits: changes of those prompts alone that satisfy a condition (CAST, Lee et al. 2024, arXiv:2409.05907).

    harmful = direction.condition(min=2.5)
    model.generate(prompts, edits=ca.edits.Conditional(refusal.add(1.0), harmful))

A condition is decided within the same forward, from what the prompt has written at its address, so every edit that
depends on it stands there or later. Generated tokens follow the decision that was made on their prompt. What other
edits change before its address is seen; what stands behind the prompt is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.address import Address
from cutaway.core.content import content
from cutaway.core.refuse import Code, Refused
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.anatomy.foreign_names import parsed
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edit import Edit, Wrapped, as_edits, index_of
from cutaway.models.edits.keep import Read, time_of
from cutaway.models.edits.library import check_limits
from cutaway.models.tokens import inner


@dataclass(frozen=True, eq=False)
class Condition:
    """A condition on a prompt: its component along a direction lies within limits, min ≤ x·û ≤ max.

    Attributes:
        address: the place where the prompt is read, without a position.
        direction: the direction; û is of length 1.
        min: the least component, in the units of the activation; None for no limit.
        max: the largest component.
        positions: the positions whose mean is x. None for all tokens of the prompt but the first, as the reading
            `mean` has it; (-1,) for the last, as `last` has it.

    Raises:
        Refused: no limit, a least above the most, or an address with a position or without vectors.
    """

    address: Address | str
    direction: Float[Tensor, "width"]
    min: float | None = None
    max: float | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        where = parsed(self.address)
        check_limits(f"condition at {where}", self.min, self.max)
        if where.position is not None or not where.row.has_position or self.positions == ():
            why = "it needs vectors at the positions of a prompt"
            raise Refused(
                f"condition at {where}", why, "give an address such as resid_post.3, and positions apart from it"
            )

    def holds(self, x: Float[Tensor, "prompt width"]) -> Bool[Tensor, "prompt"]:
        """Return True for vectors that satisfy it."""
        along = x @ normalize(self.direction.to(x.device, x.dtype), dim=0)
        return along.eq(along.clamp(self.min, self.max))


@dataclass(frozen=True, eq=False)
class Conditional(Edit):
    """Edits of those prompts that satisfy a condition; the values of the others keep every bit.

    Attributes:
        edits: one edit or several.
        condition: the condition.

    Raises:
        Refused: an edit of a place that the model computes before the condition can be read.
    """

    edits: Edit | Sequence[Edit]
    condition: Condition
    positions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for e in as_edits(self.edits):
            if time_of(e.where.place) < time_of(self._read):
                why = f"the model computes it before {self._read}, where its condition is read"
                raise Refused(f"conditional edit at {e.where}", why, "read the condition at an earlier place")

    @property
    def _read(self) -> Address:
        return parsed(self.condition.address)

    @property
    def address(self) -> Address | str:  # type: ignore[override]
        return as_edits(self.edits)[0].address

    def parts(self) -> tuple[Edit, ...]:
        use = _Use(self.condition)
        own = (e if isinstance(e, Read) else _OfSome(e, use) for e in as_edits(self.edits))
        return (Read(str(self._read), use, self.condition.positions), *own)

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        raise Refused(
            "a conditional edit", "it reads and edits several places", ("give it to ", Code("model.edited(…)"))
        )


class _Use:
    """Use of a condition among the edits of a run.

    Attributes:
        condition: the condition.
        decided: the decision on each prompt of the latest forward, for the tokens that are generated after it.
    """

    def __init__(self, condition: Condition):
        self.condition, self.decided = condition, torch.zeros(0, dtype=torch.bool)

    def identity(self) -> str:
        """Return a hash of the condition."""
        return content(self.condition)

    def keep(self, site: str, x: Tensor, frame: ForwardFrame) -> None:
        """Decide on the prompts of a forward."""
        if frame.generating:
            return
        x = x[index_of(Read(site, self), x, frame, None) or ()]
        if x.ndim != 3:
            why = f"its values are {list(x.shape)}, which is not [batch, position, width]"
            raise Refused(f"condition at {site}", why, "use a site of vectors, such as resid_post")
        if x.shape[-1] != len(self.condition.direction):
            why = f"its direction is {len(self.condition.direction)} wide, and the place {x.shape[-1]}"
            raise Refused(f"condition at {site}", why, "give a direction that was found there")
        chosen = self._chosen(x, frame)
        share = (chosen / chosen.sum(1, keepdim=True)).to(x.device)
        self.decided = self.condition.holds(torch.einsum("bp,bpw->bw", share, x.float()))
        frame.scratch[self] = self.decided

    def _chosen(self, x: Tensor, frame: ForwardFrame) -> Bool[Tensor, "batch position"]:
        """Return the columns whose mean is read."""
        if self.condition.positions is None:
            return self._whole(x, frame)
        chosen, rows = torch.zeros(x.shape[:2], dtype=torch.bool), torch.arange(len(x))
        for position in self.condition.positions:
            columns = frame.columns(position)
            if columns is None or (isinstance(columns, Tensor) and bool((columns < 0).any())):
                raise self._unread(f"position {position} is not in this forward")
            chosen[rows, columns if isinstance(columns, int) else columns.cpu()] = True
        return chosen

    def _whole(self, x: Tensor, frame: ForwardFrame) -> Bool[Tensor, "batch position"]:
        if frame.tokens is None:  # a forward of the user's own
            return (torch.arange(x.shape[1]) >= min(1, x.shape[1] - 1)).expand(x.shape[:2])
        own = inner(frame.tokens)
        if frame.offset or x.shape[1] < own.shape[1]:
            raise self._unread("the prompt runs in parts")
        return torch.nn.functional.pad(own, (0, x.shape[1] - own.shape[1]))

    def rows(self, x: Tensor, frame: ForwardFrame) -> Bool[Tensor, "batch"]:
        """Return the decision on each row of a site's values.

        Raises:
            Refused: the condition has not been read.
        """
        found = self.decided if frame.generating else frame.scratch.get(self)
        if found is None or len(found) != len(x):
            raise self._unread("it was not read before the edit")
        return found.to(x.device)

    def _unread(self, why: str) -> Refused:
        what = f"condition at {self.condition.address}"
        return Refused(what, why, "run the whole prompt at once, and read the condition before the edit")


@dataclass(frozen=True, eq=False)
class _OfSome(Wrapped):
    """An edit of the rows that satisfy a condition."""

    local: ClassVar[bool] = False
    use: _Use

    @property
    def begins(self) -> Address:
        return min((parsed(self.use.condition.address), self.edit.begins), key=time_of)

    @property
    def placed(self) -> bool:
        return True

    def select_prompts(self, prompts: BatchSlice) -> Edit:
        return replace(self, edit=self.edit.select_prompts(prompts))

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        rows = self.use.rows(x, frame)
        return torch.where(rows.reshape(-1, *[1] * (x.ndim - 1)), self.edit.apply(x, frame), x)
