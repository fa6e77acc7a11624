"""Sources of activations for training, and the activations of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.cursor import Rounds
from cutaway.core.record import hash_tensors
from cutaway.core.refuse import Refused


class Held(Rounds):
    """Activations that are held in memory, shuffled again in every round, without end.

    Attributes:
        acts: the activations by site.
    """

    def __init__(self, acts: Mapping[str, Float[Tensor, "token _"]], batch: int, *, seed: int = 0):
        sizes = {len(x) for x in acts.values()}
        if len(sizes) != 1 or not 1 <= batch <= min(sizes):
            raise Refused(f"batches of {batch}", f"sites have {sizes} tokens", "give equal numbers, and a batch within")
        super().__init__(sizes.pop(), batch, seed)
        self.acts = dict(acts)

    def __next__(self) -> dict[str, Tensor]:
        chosen = self.indices()
        return {s: x[chosen] for s, x in self.acts.items()}

    def identity(self) -> dict[str, Any]:
        """Hash and size of the activations."""
        return {"kind": "held", "hash": hash_tensors(self.acts), "tokens": self.items, "batch": self.size}


def acts_of(batch: Any, sites: tuple[str, ...], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the activations of a batch by site, float32, without tokens that are masked.

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
