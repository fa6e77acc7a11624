"""Edits along the directions that a lens reads as tokens: swap, steer, ablate.

    found = ca.lenses.token_directions(model, lens, [" Paris", " Rome"])
    model.run_last(prompt, edits=found.swap(12, " Paris", " Rome"))

The directions of two tokens are seldom at a right angle, so that one cannot be removed without touching the other.
`swap` exchanges the stream's coordinates along both unit directions ŝ and t̂ and leaves what is at a right angle to
them alone: h − 2 (h·û) û with û along ŝ − t̂. It keeps the norm of h, and done twice it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.lenses.lens import Lens, depth_address
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.anatomy.norms import wide
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edit import Edit, at_places, fitting
from cutaway.models.edits.library import Add, Project
from cutaway.models.model import Model


@dataclass(frozen=True)
class RankOne(Edit):
    """Add `writes`, as often as `reads` says: x + (x · reads) writes.

    Attributes:
        address: the place.
        reads: the vector that is multiplied with the values, one for all or one per prompt.
        writes: the vector that is added, likewise.
        positions: several positions, in place of one in the address.
    """

    address: Address | str
    reads: Float[Tensor, "..."]
    writes: Float[Tensor, "..."]
    positions: tuple[int, ...] | None = None

    def select_prompts(self, prompts: BatchSlice) -> Edit:
        taken = {n: prompts.tensor(getattr(self, n), self.axes()) for n in ("reads", "writes")}
        return replace(self, **taken)

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        def added(old: Tensor) -> Tensor:
            reads, writes = (fitting(self, t, old).to(wide(old).dtype) for t in (self.reads, self.writes))
            return wide(old) + (wide(old) * reads).sum(-1, keepdim=True) * writes

        return at_places(self, x, frame, added)


@dataclass(frozen=True, eq=False)
class TokenDirections:
    """The directions at each depth that a lens reads as the logits of some tokens, and edits along them.

    Attributes:
        rows: the directions [layer token d_model]; their length is that of the lens's logit per unit of the stream.
        tokens: the tokens as texts, in order.
        about: the lens, JSON-ready.
    """

    rows: Float[Tensor, "layer token d_model"]
    tokens: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def unit(self, depth: int, token: str) -> Float[Tensor, "d_model"]:
        """Return the unit direction of a token at a depth (0 is the embedding).

        Raises:
            Refused: another token or depth.
        """
        if token not in self.tokens:
            raise Refused(f"direction of {token!r}", f"there are {', '.join(map(repr, self.tokens))}", "choose of them")
        if not 0 <= depth < len(self.rows):
            last = len(self.rows) - 1
            raise Refused(f"direction at depth {depth}", f"0 is the embedding, {last} the last", "choose of them")
        return normalize(self.rows[depth, self.tokens.index(token)], dim=-1)

    def swap(self, depth: int, one: str, other: str, positions: Sequence[int] | None = None) -> RankOne:
        """Exchange the stream's coordinates along the directions of two tokens."""
        reads, writes = exchange(self.unit(depth, one), self.unit(depth, other))
        return RankOne(depth_address(depth), reads, writes, _tuple(positions))

    def steer(self, depth: int, token: str, coefficient: float, positions: Sequence[int] | None = None) -> Add:
        """Add `coefficient` times the unit direction of a token to the stream."""
        return Add(depth_address(depth), self.unit(depth, token), coefficient, _tuple(positions))

    def ablate(self, depth: int, *tokens: str, positions: Sequence[int] | None = None) -> Project:
        """Project the directions of tokens out of the stream."""
        rows = torch.stack([self.unit(depth, t) for t in tokens])
        return Project(depth_address(depth), rows, positions=_tuple(positions))


def token_directions(model: Model, lens: Lens, tokens: Sequence[str]) -> TokenDirections:
    """Return the directions that a lens reads as tokens; `identity_lens(model)` gives those of the logit lens.

    Raises:
        Refused: a lens of another model, or a text of several tokens.
    """
    ids = torch.tensor([model.text.token_id(t) for t in tokens])
    return TokenDirections(lens.directions(model, ids), tuple(tokens), lens.identity())


def exchange(
    one: Float[Tensor, "*rest d_model"], other: Float[Tensor, "*rest d_model"]
) -> tuple[Float[Tensor, "*rest d_model"], Float[Tensor, "*rest d_model"]]:
    """Return what an edit of rank one reads and writes to exchange the coordinates along two unit vectors."""
    along = normalize(one - other, dim=-1)
    return -2 * along, along


def _tuple(positions: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if positions is None else tuple(positions)
