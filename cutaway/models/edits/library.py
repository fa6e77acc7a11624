"""The edits: changes of activations as frozen data.

`with model.edited(Ablate("z.9.6")): …` or `model.run(prompt, edits=[…])`. Positions are positions in each prompt
(negative from its last real token), whatever the padding; an edit without position acts on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.anatomy.foreign_names import parsed
from cutaway.models.anatomy.norms import wide
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edit import WITH_CACHE, Edit, at_places, fitting, indices
from cutaway.models.tokens import Tokens

Baseline = Literal["zero", "mean", "resample", "optimal"]


@dataclass(frozen=True)
class Replace(Edit):
    """Replace the values by others.

    Attributes:
        address: the place.
        value: what stands there instead, broadcast over the batch or one per prompt.
        positions: several positions, in place of one in the address.
        since: the first position that changes, where `value` is known to equal the run's own before it.
    """

    address: Address | str
    value: Float[Tensor, "..."]
    positions: tuple[int, ...] | None = None
    since: int = 0

    def select_prompts(self, prompts: BatchSlice) -> Edit:
        return replace(self, value=prompts.tensor(self.value, self.axes()))

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        return at_places(self, x, frame, lambda old: fitting(self, self.value, old).clone())


@dataclass(frozen=True)
class Add(Edit):
    """Add `coefficient · vector` to the values (steering).

    Attributes:
        address: the place.
        vector: the direction, broadcast over the batch or one per prompt.
        coefficient: its factor.
        positions: several positions, in place of one in the address.
        since: the first position that changes, where `vector` is known to be zero before it.
    """

    address: Address | str
    vector: Float[Tensor, "..."]
    coefficient: float = 1.0
    positions: tuple[int, ...] | None = None
    since: int = 0

    def select_prompts(self, prompts: BatchSlice) -> Edit:
        return replace(self, vector=prompts.tensor(self.vector, self.axes()))

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        def added(old: Tensor) -> Tensor:
            return old + self.coefficient * fitting(self, self.vector, old).to(old.dtype)

        return at_places(self, x, frame, added)


@dataclass(frozen=True)
class Scale(Edit):
    """Multiply the values by a factor.

    Attributes:
        address: the place.
        factor: a number, or a tensor that is broadcast over the batch or has one per prompt.
        positions: several positions, in place of one in the address.
    """

    address: Address | str
    factor: float | Float[Tensor, "..."]
    positions: tuple[int, ...] | None = None

    def select_prompts(self, prompts: BatchSlice) -> Edit:
        by = self.factor
        return replace(self, factor=prompts.tensor(by, self.axes())) if isinstance(by, Tensor) else self

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        def scaled(old: Tensor) -> Tensor:
            by = self.factor
            return old * (fitting(self, by, old).to(old.dtype) if isinstance(by, Tensor) else by)

        return at_places(self, x, frame, scaled)


@dataclass(frozen=True)
class Ablate(Edit):
    """Replace the values by a baseline: zero, or a mean, resampled or optimal value that `value` gives."""

    address: Address | str
    how: Baseline = "zero"
    value: Float[Tensor, "..."] | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self):
        if (self.value is None) != (self.how == "zero"):
            raise Refused(
                f"{self.how} ablation at {self.address}",
                "the baseline's value is missing" if self.value is None else "zero ablation takes no value",
                "give value= for mean, resample and optimal; none for zero",
            )

    def select_prompts(self, prompts: BatchSlice) -> Edit:
        return self if self.value is None else replace(self, value=prompts.tensor(self.value, self.axes()))

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        value = self.value
        if value is None:
            return at_places(self, x, frame, torch.zeros_like)
        return at_places(self, x, frame, lambda old: fitting(self, value, old).clone())


@dataclass(frozen=True)
class Project(Edit):
    """Project out the span of `directions` (rows, not necessarily orthonormal), or with `keep` all but that span."""

    address: Address | str
    directions: Float[Tensor, "rank width"]
    keep: bool = False
    positions: tuple[int, ...] | None = None

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        return at_places(self, x, frame, self._projected)

    def _projected(self, old: Tensor) -> Tensor:
        x = wide(old)
        span = torch.atleast_2d(self.directions)
        fitting(self, span[:1], old)
        basis = torch.linalg.qr(span.to(x.device, x.dtype).T).Q
        inside = x @ basis @ basis.T
        return inside if self.keep else x - inside


@dataclass(frozen=True)
class Cap(Edit):
    """Keep the component along a direction within limits: x + (clamp(x·û, min, max) − x·û) û, with û of length 1.

    A `max` alone caps the component above, a `min` alone floors it below, and equal ones clamp it to a value. Limits
    are in the units of the activation.
    """

    address: Address | str
    direction: Float[Tensor, "width"]
    min: float | None = None
    max: float | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self):
        check_limits(f"cap at {self.address}", self.min, self.max)

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        return at_places(self, x, frame, self._capped)

    def _capped(self, old: Tensor) -> Tensor:
        x = wide(old)
        unit = normalize(fitting(self, self.direction, old).to(x.dtype), dim=0)
        along = x @ unit
        return x + (along.clamp(self.min, self.max) - along).unsqueeze(-1) * unit


def check_limits(what: str, least: float | None, most: float | None) -> None:
    """Check limits of a component.

    Raises:
        Refused: there is none, or the least is above the most.
    """
    if least is None and most is None:
        raise Refused(what, "it has no limit", "give min=, max= or both")
    if least is not None and most is not None and least > most:
        raise Refused(what, f"min={least} is above max={most}", "exchange them")


@dataclass(frozen=True)
class Freeze(Edit):
    """Hold the values at those of another run: `source` is what `model.capture` returned.

    Prompts are aligned token by token, whatever the padding of the two runs. Tokens generated after the prompt are not
    held.
    """

    address: Address | str
    source: Mapping[str, Tensor] = field(repr=False)
    positions: tuple[int, ...] | None = None

    def __post_init__(self):
        if str(self.where.place) not in self.source:
            raise Refused(f"freeze {self.address}", f"the source has no {self.where.place}", "capture that site first")

    def select_prompts(self, prompts: BatchSlice) -> Edit:
        key = id(self.source), str(self.where.place)
        if key not in prompts.taken:
            prompts.taken[key] = self._source_of(prompts)
        return replace(self, source=prompts.taken[key])

    @property
    def placed(self) -> bool:
        return True

    def _source_of(self, prompts: BatchSlice) -> Mapping[str, Tensor]:
        """Slice the source by its own padding, which need not be that of the run."""
        place, there = self.where.place, getattr(self.source, "tokens", None)
        if isinstance(there, Tokens):
            if len(there) != prompts.shape[0]:
                return self.source
            prompts = BatchSlice.of(there, prompts.rows, prompts.width < prompts.shape[1])
        value = prompts.tensor(self.source[str(place)], place.row.axes.split())
        if not isinstance(there, Tokens):
            return {str(place): value}
        return type(self.source)({place: value}, prompts.tokens(there))  # type: ignore[call-arg]

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        if frame.generating and self.where.site not in WITH_CACHE:
            return x  # the prompt is in the key-value cache already
        held, found = self._held(x, frame), indices(self, x, frame)
        if found == [()]:
            return held
        new = x.clone()
        for i in found:
            new[i] = held[i]
        return new

    def _held(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        """Return x with the other run's values wherever that run had a token."""
        value = self.source[str(self.where.place)].to(x.device, x.dtype)
        here, there = frame.tokens, getattr(self.source, "tokens", None)
        if not isinstance(here, Tokens) or not isinstance(there, Tokens):
            return self._expanded(value, x).clone()
        n, has_position, new = here.ids.shape[1], self.where.row.has_position, x.clone()
        if here.padded or there.padded:
            same = here.mask.shape == there.mask.shape and torch.equal(here.mask.cpu(), there.mask.cpu())
            if here.lengths.tolist() != there.lengths.tolist() or not (same or has_position):
                raise self._unlike(value, x)
            if has_position:
                moved = value.new_zeros(len(value), n, *value.shape[2:])
                moved[here.mask.to(x.device)] = value[there.mask.to(x.device)]
                value = moved
        past = frame.hidden(x.shape[1]) if self.where.site in WITH_CACHE else frame.offset
        part = new[:, : max(n - past, 0)] if has_position else new[:, :, :n, :n]  # what is generated goes free
        if has_position:  # a part of the prompt may be in the cache already, or come later
            if value.shape[1] != n:
                raise self._unlike(value, x)
            value = value[:, past : past + part.shape[1]]
        value = self._expanded(value, part)
        if here.padded and has_position:
            real = here.mask[:, past : past + part.shape[1]].to(x.device)
            value = torch.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), value, part)
        part.copy_(value)
        return new

    def _expanded(self, value: Tensor, x: Tensor) -> Tensor:
        if value.shape[1:] != x.shape[1:] or len(value) not in (1, len(x)):
            raise self._unlike(value, x)
        return value.expand(x.shape)

    def _unlike(self, value: Tensor, x: Tensor) -> Refused:
        shapes = f"it was captured as {tuple(value.shape)} and is {tuple(x.shape)} here, or padded otherwise"
        return Refused(f"freeze {self.address}", shapes, "capture it on prompts of the same lengths")


@dataclass(frozen=True)
class Knockout(Edit):
    """Cut attention edges: set the scores from `queries` to `keys` to −∞ (Geva et al. 2023, arXiv:2304.14767).

    `address` names a pattern: `pattern.5` (all heads) or `pattern.5.3`. Positions may be negative. A query that would
    keep no key is refused, because its attention would be undefined.
    """

    address: Address | str
    queries: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    positions: tuple[int, ...] | None = None

    @cached_property
    def where(self) -> Address:
        return replace(parsed(self.address), site="scores")

    @property
    def placed(self) -> bool:
        return True

    def __post_init__(self):
        if parsed(self.address).site not in ("pattern", "scores"):
            raise Refused(
                f"knockout at {self.address}", "only attention edges can be cut", "write pattern.LAYER[.HEAD]"
            )
        if not self.queries or not self.keys:
            raise Refused(f"knockout at {self.address}", "it names no edge", "give queries= and keys=")

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        least = torch.finfo(x.dtype).min
        new, heads = x.clone(), slice(None) if self.where.unit is None else self.where.unit
        for query in self.queries:
            for b, row in enumerate(self._columns(frame, query, x)):
                for key in self.keys:
                    column = self._columns(frame.whole, key, x)[b]
                    # A sliding window keeps the latest keys only; what has left it is cut already.
                    if row is not None and column is not None and (here := column - frame.hidden(x.shape[3])) >= 0:
                        new[b, heads, row, here] = least
        if bool(((new.amax(-1) <= least / 2) & (x.amax(-1) > least / 2)).any()):
            raise Refused(
                f"knockout at {self.address}", "a query would keep no key at all", "leave it at least itself or BOS"
            )
        return new

    def _columns(self, frame: ForwardFrame, position: int, x: Tensor) -> list[int | None]:
        column = frame.columns(position)
        if column is None and not frame.has(position):
            why = f"position {position} is outside the prompt"
            raise Refused(f"knockout at {self.address}", why, "choose another position")
        if isinstance(column, Tensor):
            return [c if c >= 0 else None for c in column.tolist()]
        return [column] * len(x)
