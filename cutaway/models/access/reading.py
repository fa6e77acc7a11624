"""Readings: what a measurement takes from a forward, and the one forward that shows it.

A metric is a function of the last logits, or a `Measure`: a function with the activations that it reads. Runs, sweeps
and gradients take both; a forward that need not reach the logits ends at the deepest place that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.models.access import forward, taps
from cutaway.models.access.capture import Activations, Collector
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.tokens import Tokens

OfLogits = Callable[[Float[Tensor, "row token"], Int[Tensor, "row"]], Float[Tensor, "row *metric"]]


@dataclass(frozen=True)
class Reads:
    """The parts of a forward that a measurement reads.

    Attributes:
        last_logits: True if it takes the logits after each prompt's last token.
        places: the sites that it takes whole, each with its layer.
        continuations: True if it takes the logits in front of every token of the prompts' continuations.
    """

    last_logits: bool = True
    places: tuple[Address, ...] = ()
    continuations: bool = False

    @property
    def early(self) -> bool:
        """True if the forward may end before the logits of the last token."""
        return bool(self.places) and not (self.last_logits or self.continuations)

    def deepest(self, layers: int) -> int:
        """Return the last block that anything read depends on; `layers` if what follows the blocks is read too."""
        return layers if not self.early else max(depth(a, layers) for a in self.places)

    def since(self, layer: int, layers: int) -> Reads:
        """Return what of it a forward shows that starts at the block `layer`."""
        return replace(self, places=tuple(a for a in self.places if layer == 0 or depth(a, layers) >= layer))

    def __or__(self, other: Reads) -> Reads:
        places = tuple(dict.fromkeys((*self.places, *other.places)))
        return Reads(self.last_logits or other.last_logits, places, self.continuations or other.continuations)


@dataclass(frozen=True)
class Continued:
    """Logits in front of every token of the prompts' continuations.

    Attributes:
        logits: the logits after each prompt's last token, and after each token behind it.
        tokens: the prompts with their continuations.
    """

    logits: Float[Tensor, "row step token"]
    tokens: Tokens


@dataclass(frozen=True)
class Seen:
    """The parts of a forward that a measurement has read; None for those that it does not read.

    Attributes:
        columns: the tokens whose last logits were computed, ascending; None for the whole vocabulary.
    """

    last_logits: Float[Tensor, "row token"] | None = None
    activations: Activations | None = None
    continuations: Continued | None = None
    columns: Int[Tensor, "token"] | None = None

    def columns_of(self, ids: Int[Tensor, "*rest"]) -> Int[Tensor, "*rest"]:
        """Return where tokens are among the last logits; −1, which fills up sets of tokens, stays."""
        return ids if self.columns is None else torch.searchsorted(self.columns, ids).where(ids >= 0, ids)


@dataclass(frozen=True)
class Measure:
    """A measurement that says what it reads.

    Attributes:
        function: takes what was seen and the index of each row's prompt, and returns one number per row, or several.
        reads: what is seen.
        columns: the only tokens, ascending, whose last logits it reads, if it can do without all others; it must then
            look its tokens up with `Seen.columns_of`.
    """

    function: Callable[[Seen, Int[Tensor, "row"]], Float[Tensor, "row *metric"]]
    reads: Reads = Reads()
    columns: Int[Tensor, "token"] | None = None

    def __call__(self, seen: Seen, prompt: Int[Tensor, "row"]) -> Float[Tensor, "row *metric"]:
        return self.function(seen, prompt)

    def known_as(self) -> Callable[..., Tensor] | None:
        """Return what keys know it as: its function where it reads last logits alone, as functions do; else None."""
        return self.function if self.reads == Reads() else None

    def of_copies(self, prompts: int) -> Measure:
        """Return the measurement of several copies of its prompts, one behind the other."""
        return replace(self, function=lambda seen, prompt: self.function(seen, prompt % prompts))


def measure_of(metric: Measure | OfLogits) -> Measure:
    """Return a metric as a measurement; a function of last logits and prompts reads those."""
    if isinstance(metric, Measure):
        return metric

    def function(seen: Seen, prompt: Tensor) -> Tensor:
        assert seen.last_logits is not None
        return metric(seen.last_logits, prompt)

    return Measure(function)


def jointly(measures: Sequence[Measure]) -> Measure:
    """Return several measurements of the same forward as one, with one column each."""

    def function(seen: Seen, prompt: Tensor) -> Tensor:
        return torch.stack([m(seen, prompt) for m in measures], dim=-1).float()

    reads = measures[0].reads
    for m in measures[1:]:
        reads = reads | m.reads
    columns = [m.columns for m in measures if m.columns is not None]
    return Measure(function, reads, torch.cat(columns).unique() if len(columns) == len(measures) else None)


def depth(place: Address, layers: int) -> int:
    """Return the block that a place lies in; −1 before the first and `layers` behind the last."""
    if place.layer is not None:
        return place.layer
    return -1 if place.site in ("embed", "pos_embed") else layers


def observe(anatomy: Anatomy, tokens: Tokens, reads: Reads, since: int = 0) -> Seen:
    """Run a forward and return what a measurement reads of it.

    The forward ends early where nothing further is read and no tap waits. `since` blocks pass their input through and
    do not count.

    Raises:
        Refused: a place that this model does not have.
    """
    skipped = since / anatomy.shape.n_layers
    if not reads.places:
        return Seen(*_logits(anatomy, tokens, reads, 1.0 - skipped))
    collector = Collector(anatomy, reads.places, live=True, stops=reads.early)
    with taps.attached(anatomy, {p: collector.see(p) for p in collector.places}):
        last, more = None, None
        if not reads.early:
            last, _, more = _logits(anatomy, tokens, reads, 1.0 - skipped)
        else:
            forward.streams(anatomy, tokens, collector.share - skipped, 1.0 - skipped)
    collector.notice(tokens)
    return Seen(last, collector.activations(tokens), more)


def _logits(
    anatomy: Anatomy, tokens: Tokens, reads: Reads, share: float
) -> tuple[Tensor | None, None, Continued | None]:
    """Run a forward to its end and return the logits that are read of it, as `Seen` has them."""
    if not reads.continuations:
        return forward.last_logits(anatomy, tokens, share), None, None
    logits = forward.next_logits(anatomy, tokens, share)
    return logits[:, 0] if reads.last_logits else None, None, Continued(logits, tokens)
