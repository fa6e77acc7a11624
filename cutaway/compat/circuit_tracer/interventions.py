"""Interventions on features as an edit: what setting them changes of what they write is added to the MLPs' output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import parse
from cutaway.graphs.latents import Transcoders
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.keep import Read

Intervention = tuple[Any, Any, Any, Any]  # layer, position or positions, feature or features, value or values


def activations(
    over: Transcoders, layer: int, x: Tensor, leading: int, gated: bool = True
) -> Float[Tensor, "_ latent"]:
    """Return the features of a layer on a prompt, or what their gates read; 0 at leading positions."""
    d, block, reads = over.dictionary, over.blocks[layer], {f"mlp_in.{layer}": x.to(over.dictionary.dtype)}
    found = d.encode(reads, block).dense() if gated else d.pre_activations(block, reads).clone()
    found[:leading] = 0.0
    return found


class Seen:
    """Record of what stands at some sites in each forward of a generation."""

    def __init__(self) -> None:
        self.sites = defaultdict[str, list[Tensor]](list)

    def keep(self, site: str, x: Tensor, frame: ForwardFrame) -> None:
        """Keep what stands at a site."""
        self.sites[site].append(x)

    def identity(self) -> str:
        """Return what tells it from others."""
        return str(id(self))


@dataclass(frozen=True, eq=False)
class SetFeatures(Edit):
    """Edit that sets features of a prompt, and of new tokens where its positions have no end.

    Attributes:
        over: the transcoders.
        wanted: the interventions.
        leading: the positions at which features count as inactive.
        layers: layers that are held: within these, effects do not pass to other features; None to let them pass.
        plain: what MLPs read without it.
    """

    over: Transcoders
    wanted: Sequence[Intervention]
    leading: int
    layers: range | None
    plain: Mapping[str, Tensor]
    positions: tuple[int, ...] | None = None

    def parts(self) -> tuple[Edit, ...]:
        d = self.over.dictionary
        return (*(Read(r, self) for r in d.reads), *(_Added(w, self) for w in d.writes))

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        return x

    def identity(self) -> str:
        """Return what tells it from others."""
        return str(id(self))

    def keep(self, site: str, x: Tensor, frame: ForwardFrame) -> None:
        """Add what the interventions on a layer change to what is to be written."""
        layer, d, out = int(parse(site).layer or 0), self.over.dictionary, frame.scratch.setdefault(self, {})
        held = range(0) if frame.generating else self.layers or range(0)
        old = activations(self.over, layer, self.plain[site] if held else x, 0 if frame.generating else self.leading)
        new = old.clone()
        for at, position, feature, value in self.wanted:
            endless = isinstance(position, slice) and position.stop is None
            if int(at) == layer and (endless or not frame.generating):
                new[0 if frame.generating else position, feature] = torch.as_tensor(value).to(new)
        some = (new != old).any(0).nonzero()[:, 0]
        for write, rows in d.decoder[self.over.blocks[layer]].items():
            if not held or parse(write).layer in held:
                out[write] = out.get(write, 0.0) + (new - old)[:, some] @ rows[some]
        for (read, write), matrix in d.skip.items():
            if read == site and parse(write).layer in held:  # a skip of a held MLP follows what it reads
                out[write] = out.get(write, 0.0) + ((x - self.plain[site]) @ matrix.T)[0]


@dataclass(frozen=True, eq=False)
class _Added(Edit):
    """The part of `SetFeatures` that adds to what one MLP writes."""

    local: ClassVar[bool] = False
    address: str
    use: SetFeatures
    positions: tuple[int, ...] | None = None

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        return x + torch.as_tensor(frame.scratch[self.use].pop(self.address, 0.0)).to(x)
