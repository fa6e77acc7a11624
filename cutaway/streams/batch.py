"""Batches of a stream (activations of some tokens, with the tokens), and the protocol of streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.cursor import Source


@dataclass(frozen=True)
class Batch:
    """Activations of some tokens by address; axes beyond the token (heads) are flattened.

    `document` is the number of each token's document, `context` that of its context and `position` its place there;
    `mask` is False for special tokens and sinks (only where the stream keeps them).
    """

    acts: dict[str, Float[Tensor, "token _"]]
    ids: Int[Tensor, "token"]
    document: Int[Tensor, "token"]
    context: Int[Tensor, "token"]
    position: Int[Tensor, "token"]
    mask: Bool[Tensor, "token"]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def words(self) -> tuple[Tensor, ...]:
        """The ids, document, context, position and mask of each token."""
        return self.ids, self.document, self.context, self.position, self.mask

    def rows(self, chosen: Tensor | slice) -> Batch:
        """Select some of the tokens."""
        return Batch({a: x[chosen] for a, x in self.acts.items()}, *(t[chosen] for t in self.words))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Return the same batch elsewhere, its activations in another dtype if asked for."""
        acts = {a: x.to(device, dtype or x.dtype) for a, x in self.acts.items()}
        return Batch(acts, *(t.to(device) for t in self.words))


@runtime_checkable
class Stream(Source, Protocol):
    """Batches of activations one after the other, with an exact cursor."""

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of the activations by address."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go to where `state` was taken."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return the model, documents and options, JSON-ready, for records."""
        ...
