"""What training reads: any source of activations with an exact cursor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.record import hash_tensors
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator


@runtime_checkable
class Source(Protocol):
    """Batches, each a tensor [token, width], a mapping from sites to such, or with these as `acts`; and a cursor.

    A source may also say `epoch`, how often it had been handed out before the last batch, and `moments()` of its sites.
    """

    def __iter__(self) -> Iterator[Any]: ...

    def state(self) -> dict[str, Any]:
        """Where the source stands, JSON-ready."""
        ...

    def restore(self, state: Mapping[str, Any]) -> Any:
        """Go to where `state` was taken."""
        ...


class Held:
    """Activations that are held in memory, shuffled anew in every round, without end."""

    def __init__(self, acts: Mapping[str, Float[Tensor, "token _"]], batch: int, *, seed: int = 0):
        sizes = {len(x) for x in acts.values()}
        if len(sizes) != 1 or not 1 <= batch <= min(sizes):
            raise Refused(f"batches of {batch}", f"sites have {sizes} tokens", "give equal numbers, and a batch within")
        self.acts, self.batch, self.seed = dict(acts), batch, seed
        self.tokens = sizes.pop()
        self.number = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Tensor]:
        rounds = self.tokens // self.batch
        number, at = divmod(self.number, rounds)
        order = torch.randperm(self.tokens, generator=generator(self.seed * 1_000_003 + number))
        self.number += 1
        chosen = order[at * self.batch : (at + 1) * self.batch]
        return {s: x[chosen] for s, x in self.acts.items()}

    @property
    def epoch(self) -> int:
        """How often all had been handed out before the last batch."""
        return max(0, self.number - 1) // (self.tokens // self.batch)

    def state(self) -> dict[str, Any]:
        """Where the source stands."""
        return {"number": self.number, "batch": self.batch, "seed": self.seed}

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go to where `state` was taken."""
        if (state["batch"], state["seed"]) != (self.batch, self.seed):
            raise Refused("a cursor", "it is of another batch size or seed", "make the source as it was made then")
        self.number = state["number"]
        return self

    def identity(self) -> dict[str, Any]:
        """What it holds."""
        return {"kind": "held", "hash": hash_tensors(self.acts), "tokens": self.tokens, "batch": self.batch}


def acts_of(batch: Any, sites: tuple[str, ...], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The activations of a batch by site, float32, without tokens that are masked.

    Raises:
        Refused: a site is missing, or an unnamed tensor where there are several sites.
    """
    found = getattr(batch, "acts", batch)
    mask = getattr(batch, "mask", None)
    if isinstance(found, Tensor):
        if len(sites) != 1:
            raise Refused("activations without names", f"{len(sites)} sites are trained on", "give a mapping by site")
        found = {sites[0]: found}
    missing = [s for s in sites if s not in found]
    if missing:
        raise Refused(f"site {missing[0]}", f"the source gives {', '.join(found)}", "read that site, or train on these")
    whole = mask is None or bool(mask.all())
    kept = {s: found[s] if whole else found[s][mask] for s in sites}
    return {s: x.flatten(1).to(device, torch.float32) for s, x in kept.items()}
