"""Units of MLPs that are active in one run, as sources and as readers: latents of a dictionary, or neurons themselves.

A unit is a source of `activation · what it writes`, and a target with a linear reader of the MLP's input whose value it
explains:

* A latent of a (skip) transcoder or of a cross-layer transcoder: its value is the pre-activation W_e x + b_enc. It may
  write several layers. What its dictionary does not reconstruct of an MLP's output is that layer's error; skip
  connections stay linear paths of the frozen model, and b_dec is a constant of the layer.
* A neuron of a plain MLP: its value is the pre-activation W_in x + b_in. Neurons leave no error.
* A neuron of a gated MLP, a = act(g) · u: its value is the activation itself, split by the half rule of RelP and of
  AttnLRP (Jafari et al. 2025, arXiv:2508.21258; Achtibat et al. 2024, arXiv:2402.05602). With act(g), act(g) / g and u
  frozen, ½ act(g) · u + ½ (act(g) / g) u · g is linear in what u and g read, and sums to a exactly.

Units at leading positions are no nodes: what their MLPs write there is one source each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.node import Latent, Node


@dataclass(frozen=True, eq=False)
class Table:
    """Active units, sorted by position, then layer, then number.

    Attributes:
        layer: the layer whose MLP input each reads.
        position: its position.
        index: its number within the layer.
        activation: its activation.
        value: what its row of the graph sums to.
    """

    layer: Int[Tensor, "unit"]
    position: Int[Tensor, "unit"]
    index: Int[Tensor, "unit"]
    activation: Float[Tensor, "unit"]
    value: Float[Tensor, "unit"]

    def __len__(self) -> int:
        return len(self.layer)

    @classmethod
    def sorted(cls, parts: Sequence[Table]) -> Table:
        """Return the units of several tables as one."""
        layer, position, index, activation, value = (
            torch.cat([getattr(p, n) for p in parts]) for n in ("layer", "position", "index", "activation", "value")
        )
        order = torch.argsort(index, stable=True)
        for key in (layer, position):
            order = order[torch.argsort(key[order], stable=True)]
        return cls(layer[order], position[order], index[order], activation[order], value[order])

    def starts(self, layers: int, width: int) -> Int[Tensor, "position layer_and_end"]:
        """Return where the units of each position and layer begin; the last entry of a row is where they end."""
        key = self.position * layers + self.layer
        edges = torch.arange(width * layers + 1, device=key.device)
        flat = torch.searchsorted(key, edges)
        return torch.stack([flat[q * layers : (q + 1) * layers + 1] for q in range(width)])


@dataclass(frozen=True, eq=False)
class Written:
    """Parts of one layer's MLP output.

    Attributes:
        first: the first layer whose units write it.
        last: the last one.
        vectors: at each position, what the units of these layers write, activation included [unit, d_model].
        error: what no unit writes, though it ought to be units [position, d_model].
        others: what units that are not in the table write [position, d_model].
        constant: what is added whatever the stream is [position, d_model].
        whole: the whole output at leading positions [leading, d_model].
    """

    first: int
    last: int
    vectors: list[Float[Tensor, "_ d_model"]]
    error: Float[Tensor, "position d_model"]
    others: Float[Tensor, "position d_model"]
    constant: Float[Tensor, "position d_model"]
    whole: Float[Tensor, "leading d_model"]


@dataclass(frozen=True)
class Skip:
    """A linear path of the replacement from what one MLP reads to what the same or a later one writes."""

    read: int
    written: int
    matrix: Float[Tensor, "d_model d_model"] = field(repr=False)


class Units(ABC):
    """The active units of one run.

    Attributes:
        table: the units.
        written: what each layer's MLP output is made of.
        skips: linear paths around the units.
        leading: the number of leading positions whose units are no nodes.
    """

    table: Table
    written: list[Written]
    skips: tuple[Skip, ...] = ()
    leading: int

    @abstractmethod
    def readers(self, units: Int[Tensor, "row"]) -> Float[Tensor, "row d_model"]:
        """Return the vectors with which some units read the stream before their MLP."""

    @abstractmethod
    def constants(self, units: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        """Return the part of some units' values that is there whatever the stream is."""

    @abstractmethod
    def node(self, layer: int, index: int, position: int) -> Node:
        """Return the node of a unit."""


def latent_node(layer: int, index: int, position: int) -> Latent:
    """Return the node of a latent: its block is the layer that it reads."""
    return Latent(layer, index, position)


def neuron_node(layer: int, index: int, position: int) -> Address:
    """Return the node of a neuron."""
    return Address("mlp_post", layer, index, position)
