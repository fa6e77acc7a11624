"""Tangents: how places of a forward move with a step at another place, to first order (forward differentiation)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from cutaway.core.address import Address
from cutaway.core.refuse import Keyword, Refused
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edit import Edit, at_places, fitting
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens


@dataclass(frozen=True)
class Tangent(Edit):
    """Leave the values as they are, and let their tangent be `vector`; only within `forward_ad.dual_level`.

    Attributes:
        address: the place.
        vector: the tangent, broadcast over the batch or one per prompt.
        positions: several positions, in place of one in the address.
    """

    address: Address | str
    vector: Float[Tensor, "..."]
    positions: tuple[int, ...] | None = None

    def select_prompts(self, prompts: BatchSlice) -> Edit:
        return replace(self, vector=prompts.tensor(self.vector, self.axes()))

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        step = at_places(self, torch.zeros_like(x), frame, lambda old: old + fitting(self, self.vector, old).to(old))
        return forward_ad.make_dual(x, step)


def tangents(
    model: Model, tokens: Tokens, step: Tangent, places: Sequence[Address]
) -> Float[Tensor, "prompt place width"]:
    """Return the derivatives of some places at each prompt's last position along a step (Jacobian-vector products).

    Raises:
        Refused: an operation of the model that has no forward derivative.
    """

    def read(seen: Seen, prompt: Tensor) -> Tensor:
        assert seen.activations is not None
        duals = [forward_ad.unpack_dual(seen.activations[f"{p}@-1"]) for p in places]
        return torch.stack([torch.zeros_like(d.primal) if d.tangent is None else d.tangent for d in duals], 1)

    try:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
            return model.measure(tokens, Measure(read, Reads(last_logits=False, places=tuple(places))), step)
    except RuntimeError as error:
        if "forward AD" not in str(error):
            raise
        why = f"an operation has no forward derivative: {str(error).splitlines()[0]}"
        raise Refused(
            f"a tangent of {model.name}", why, ("give ", Keyword("attention", "eager", of="model"))
        ) from error
