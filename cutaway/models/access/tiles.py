"""Attention of a layer by tiles: some queries on some keys, so that no table of all queries by all keys is formed.

A tile's scores are the argument of the softmax in the family's own eager attention, called on these queries and keys
alone: scaling, soft caps, masks, windows and sinks are never imitated. Families that compute attention inline form the
whole pattern anyway, and so does a layer whose scores or pattern are edited: tiles there are parts of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models.access import attention, taps
from cutaway.models.access.ports import port
from cutaway.models.anatomy.anatomy import Anatomy

Rows = Int[Tensor, "row"]
Scores = Float[Tensor, "head row key"]


@runtime_checkable
class Tiles(Protocol):
    """Protocol of the scores of one layer on one sequence, by tiles.

    Attributes:
        heads: number of query heads.
        length: number of positions.
        formed: True if `exp` of the scores is the attention itself, as it was formed: nothing is left to normalise.
        sink: True if the softmax has one more column, of score 0, that stands for no token.
    """

    heads: int
    length: int
    formed: bool
    sink: bool

    def __call__(self, rows: Rows, start: int, stop: int) -> Scores:
        """Return the scores of some queries on the keys from `start` to before `stop`; −1e30 or less where hidden.

        The tensor is new: the caller may write to it.
        """
        ...


class EagerTiles:
    """Tiles of a module that hands its attention to transformers' registry, as `attention.tiles` found it.

    Attributes:
        query: queries [1, head, position, d_head].
        key: keys [1, kv_head, position, d_head].
    """

    formed = False

    def __init__(self, call: attention.Eager):
        self.call, self.query, self.key = call, call.query, call.key
        self.heads, self.length = self.query.shape[1], self.query.shape[2]
        self.sink = False
        self(torch.zeros(1, dtype=torch.long, device=self.query.device), 0, 1)  # finds out about the sink

    def __call__(self, rows: Rows, start: int, stop: int) -> Scores:
        """Return the scores of some queries on the keys from `start` to before `stop`."""
        mask = self._mask(rows, start, stop)
        k, v = (x[:, :, start:stop] for x in (self.key, self.call.value))
        try:
            with _UntilSoftmax():
                self.call.function(self.call.module, self.query[:, :, rows], k, v, mask, **self.call.keywords)
        except _Formed as formed:
            scores = formed.scores[0]
        else:
            raise Refused("scores by tiles", "this attention forms no softmax", "capture its patterns instead")
        scores = scores if scores.dtype == torch.float64 else scores.float()
        more = scores[..., stop - start :]  # a family may shift all columns alike: they count from the sinks'
        self.sink = more.shape[-1] > 0
        if self.sink:
            scores = scores[..., : stop - start] - more.logsumexp(-1, keepdim=True)
        if mask is None:
            return scores
        return torch.where(mask[0] > torch.finfo(mask.dtype).min / 2, scores, -1e30)

    def _mask(self, rows: Rows, start: int, stop: int) -> Tensor | None:
        """Return the additive mask of a tile; None where it hides nothing."""
        given = self.call.mask
        if given is not None:
            part = given[:, :, rows, start:stop]
            if part.dtype != torch.bool:
                return part
            return torch.zeros(part.shape, dtype=self.query.dtype, device=part.device).masked_fill(
                ~part, torch.finfo(self.query.dtype).min
            )
        if not self.call.causal or stop - 1 <= int(rows.min()):
            return None
        ahead = torch.arange(start, stop, device=rows.device) > rows[:, None]
        zero = torch.zeros((1, 1, *ahead.shape), dtype=self.query.dtype, device=rows.device)
        return zero.masked_fill(ahead, torch.finfo(zero.dtype).min)


class FormedTiles:
    """Tiles of a pattern that was formed anyway."""

    formed, sink = True, False

    def __init__(self, pattern: Float[Tensor, "head q_pos k_pos"]):
        self.pattern = pattern if pattern.dtype == torch.float64 else pattern.float()
        self.heads, self.length = pattern.shape[:2]

    def __call__(self, rows: Rows, start: int, stop: int) -> Scores:
        """Return the logarithm of the attention of some queries to the keys from `start` to before `stop`."""
        return self.pattern[:, rows, start:stop].log().clamp_min(-1e30)


class _Formed(Exception):
    """Raised when the scores of a tile are there."""

    def __init__(self, scores: Tensor):
        super().__init__()
        self.scores = scores


class _UntilSoftmax(TorchFunctionMode):
    """Within the block, the first softmax ends the computation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "softmax":
            raise _Formed(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def tiled(anatomy: Anatomy, sees: Mapping[int, Callable[[Tiles], None]]) -> Iterator[None]:
    """Within the block, each forward of one sequence shows the tiles of these layers to their functions.

    Raises:
        Refused: a layer without attention, or one that a forward did not pass.
    """
    with ExitStack() as stack:
        formed, by_tiles, silent = dict[Address, taps.See](), dict[Any, Any](), set(sees)
        for layer, see in sees.items():
            place = Address("pattern", layer)
            p = port(anatomy, place)
            if p is None:
                raise Refused(f"attention of layer {layer}", "it has none", "choose among the layers that have")
            if attention.uses_interface(p.module) and not attention.wants(p.module, *attention.FORMED):
                by_tiles[p.module] = (frozenset({"tiles"}), partial(_show, see, layer, silent))
            else:
                formed[place] = partial(_show_pattern, see, layer, silent)
        stack.enter_context(taps.attached(anatomy, formed))
        stack.enter_context(attention.watching(by_tiles))
        yield
        if silent:
            names = ", ".join(str(i) for i in sorted(silent))
            raise Refused(f"tiles of layers {names}", "the forward ran and never passed their attention", "capture z")


def _show(see: Callable[[Tiles], None], layer: int, silent: set[int], site: str, call: attention.Eager) -> Any:
    silent.discard(layer)
    see(EagerTiles(call))
    return call


def _show_pattern(see: Callable[[Tiles], None], layer: int, silent: set[int], pattern: Tensor) -> Tensor:
    silent.discard(layer)
    see(FormedTiles(pattern[0].detach()))
    return pattern
