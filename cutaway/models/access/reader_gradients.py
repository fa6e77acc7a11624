"""Gradients at every reader of the residual stream, of one forward and one backward.

What a head's queries, keys and values read is one tensor for all heads, so autograd alone cannot tell them apart. The
gradient at the output of each projection can: through a head's columns of the matrix, and back through the norm at its
point, it is the gradient of the stream as that head alone reads it. It is expanded one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cutaway.core.address import Address
from cutaway.models.access import taps
from cutaway.models.access.backward import Attention, gradients
from cutaway.models.access.capture import Activations
from cutaway.models.access.ports import Port
from cutaway.models.access.reading import Measure
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.anatomy.linear import matrix
from cutaway.models.anatomy.norms import wide
from cutaway.models.anatomy.offload import present
from cutaway.models.anatomy.projections import Letter, projection
from cutaway.models.tokens import Tokens

_LETTERS: tuple[Letter, ...] = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class ReaderGradients:
    """Gradients of each prompt's metric at the stream as every reader reads it.

    The batch may hold several copies of the prompts, one behind the other, whose gradients are averaged.

    Attributes:
        anatomy: the model's modules.
        values: the metric of each row.
        given: the activations of the run: streams, and what was asked for beside them.
        slopes: the gradients at the MLPs' inputs and at the last stream.
        heads: the gradients at the outputs of modules that make queries, keys and values.
        copies: number of copies of the prompts.
        constant: True if norms pass gradients as if their divisors were constants (relevance).
    """

    anatomy: Anatomy
    values: Float[Tensor, "row"]
    given: Activations
    slopes: Activations
    heads: dict[nn.Module, Float[Tensor, "row position output"]]
    copies: int = 1
    constant: bool = False

    def at(self, reader: Address) -> Float[Tensor, "batch reader position d_model"]:
        """Return those of all readers that share a stream and a norm with one reader: of a layer's queries (by head),
        keys and values (by key-value head), in this order; of a layer's MLP; or of the logits.
        """
        if reader.layer is None:
            return self._mean(wide(self.slopes[f"resid_post.{self.anatomy.shape.n_layers - 1}"].unsqueeze(1)))
        if reader.site == "mlp_in":
            return self._before_norm(self.slopes[str(reader)].unsqueeze(1), reader.layer, "ln2")
        return self._at_attention(reader.layer)

    def _at_attention(self, layer: int) -> Float[Tensor, "batch reader position d_model"]:
        parts = list[Tensor]()
        for letter in _LETTERS:
            found = projection(self.anatomy, layer, letter)
            assert found is not None
            module, columns = found
            slope, chosen = self.heads[module], _chosen(columns)
            with present(module):
                weight = matrix(module).T[chosen].unflatten(0, columns.shape)  # [head d_head d_model]
            slope = slope[..., chosen].unflatten(-1, columns.shape).permute(2, 0, 1, 3)  # [head row position d_head]
            parts.append((slope.flatten(1, 2) @ weight.to(slope)).unflatten(1, slope.shape[1:3]))
        return self._before_norm(torch.cat(parts).transpose(0, 1), layer, "ln1")

    def _before_norm(self, slopes: Tensor, layer: int, name: Literal["ln1", "ln2"]) -> Tensor:
        norm, stream = reading_norm(self.anatomy, layer, name)
        slopes = wide(slopes)
        if norm is not None:
            x = self.given[str(stream)].unsqueeze(1)
            slopes = self.anatomy.norm(norm).pulled(slopes, wide(x), self.constant)
        return self._mean(slopes)

    def _mean(self, slopes: Float[Tensor, "row reader position d_model"]) -> Tensor:
        return slopes if self.copies == 1 else slopes.unflatten(0, (self.copies, -1)).mean(0)


def _chosen(columns: Int[Tensor, "head d_head"]) -> slice | Int[Tensor, "output"]:
    """Return the outputs of a projection that belong to its heads, as a slice where they are one: it copies nothing."""
    flat = columns.flatten()
    first = int(flat[0])
    return slice(first, first + len(flat)) if torch.equal(flat, torch.arange(first, first + len(flat))) else flat


def reading_norm(anatomy: Anatomy, layer: int, name: Literal["ln1", "ln2"]) -> tuple[nn.Module | None, Address]:
    """Return the norm through which a layer's attention (ln1) or MLP (ln2) reads, or None, and the stream before it."""
    norm = anatomy.part(layer, name)
    if norm is None and name == "ln2" and anatomy.parallel:
        norm = anatomy.part(layer, "ln1")
    norm = None if isinstance(norm, nn.Identity) else norm  # taken out
    return norm, Address("resid_mid" if name == "ln2" and not anatomy.parallel else "resid_pre", layer)


def reader_gradients(
    anatomy: Anatomy,
    tokens: Tokens,
    measure: Measure,
    beside: Sequence[Address] = (),
    relevance: Attention | None = None,
    copies: int = 1,
) -> ReaderGradients:
    """Run one forward and one backward, and keep the gradients of the metric at every reader.

    Args:
        beside: further places whose activations are kept.
        relevance: the rule for attention, if relevance coefficients take the place of gradients (`gradients`).
        copies: how often the prompts stand one behind the other in `tokens`; the measure is of one copy.

    Raises:
        Refused: as `gradients`.
    """
    layers, last = range(anatomy.shape.n_layers), Address("resid_post", anatomy.shape.n_layers - 1)
    streams = [reading_norm(anatomy, i, name)[1] for i in layers for name in ("ln1", "ln2")]
    places = list(dict.fromkeys([*streams, *(Address("mlp_in", i) for i in layers), last, *beside]))
    measure = measure.of_copies(len(tokens) // copies) if copies > 1 else measure
    with _noting(anatomy) as heads:
        values, (slopes,), given = gradients(anatomy, tokens, places, measure, relevance=relevance)
    return ReaderGradients(anatomy, values, given, slopes, heads, copies, relevance is not None)


def stream_read(anatomy: Anatomy, reader: Address) -> Address:
    """Return the stream that a reader reads, before any norm."""
    if reader.layer is None:
        return Address("resid_post", anatomy.shape.n_layers - 1)
    return reading_norm(anatomy, reader.layer, "ln2" if reader.site == "mlp_in" else "ln1")[1]


@contextmanager
def _noting(anatomy: Anatomy) -> Iterator[dict[nn.Module, Tensor]]:
    """Within the block, note what a backward pass brings to the outputs of all projections of attention."""
    found = dict[nn.Module, Tensor]()

    def see(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def noted(y: Tensor) -> Tensor:
            y.register_hook(lambda slope: found.__setitem__(module, slope))
            return y

        return noted

    parts = [projection(anatomy, i, letter) for i in range(anatomy.shape.n_layers) for letter in _LETTERS]
    modules = dict.fromkeys(part[0] for part in parts if part is not None)
    ports = {f"projection {n}": (_output_of(m), see(m)) for n, m in enumerate(modules)}
    with taps.attached(anatomy, {}, gradient=True, others=ports):
        yield found


def _output_of(module: nn.Module) -> Port:
    return Port(module, "out", lambda x, y: y, lambda new, x, y: new)
