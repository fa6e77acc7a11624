"""The wiring of a model: all writers and all readers of its residual stream, and which reader hears which writer.

Circuits are sets of its edges. The stream that a reader v reads is x_v = Σ_u [cur_u + (1 − m_uv)(alt_u − cur_u)] over
the writers u that it hears, with a mask m over edges, values cur of the run and values alt of an alternative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.node import Edge
from cutaway.core.refuse import Code, Refused
from cutaway.models.anatomy.residual import check_sum
from cutaway.models.edits.edges import precedes
from cutaway.models.model import Model

_WRITERS = ("z", "mlp_out")
_READERS = ("q_in", "k_in", "v_in", "mlp_in")


@dataclass(frozen=True)
class Wiring:
    """The writers × readers of a model's residual stream.

    The embeddings are one writer (`embed`: all that enters the first block), and each head's output (`z.l.h`) and each
    MLP (`mlp_out.l`) is one. The queries of each head (`q_in.l.h`), the keys and the values of each key-value head
    (`k_in.l.g`, `v_in.l.g`), each MLP (`mlp_in.l`) and the `logits` read. Constants that attention adds are left out.

    Attributes:
        writers: the writers in order of depth.
        readers: the readers in order of depth.
        heard: True where the reader hears the writer.
    """

    writers: tuple[Address, ...]
    readers: tuple[Address, ...]
    heard: Bool[Tensor, "writer reader"]

    @cached_property
    def pairs(self) -> Int[Tensor, "edge 2"]:
        """Indices of the writer and the reader of each edge, by writer, then by reader."""
        return self.heard.nonzero()

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The edges in the order of `pairs`."""
        return tuple(Edge(self.writers[u], self.readers[v]) for u, v in self.pairs.tolist())


def wiring(model: Model) -> Wiring:
    """Return the wiring of a model.

    Raises:
        Refused: the stream is not the sum of what is written into it, or a head reads or writes at no place of
            its own (state-space layers, compressed attention, queries beside a gate).
    """
    check_sum(model)
    return model.anatomy.remember(("wiring", *sorted(model.disabled)), lambda: _wired(model))


def _wired(model: Model) -> Wiring:
    lacking = [s for s in (*_WRITERS, *_READERS) if not model.sites()[s].startswith("read and write")]
    if lacking:
        why = f"it has no {', '.join(lacking)} that could be edited"
        raise Refused(f"wiring of {model.name}", why, ("see ", Code("model.sites()")))
    writers = (Address("embed"), *_by_layer(model, _WRITERS))
    readers = (*_by_layer(model, _READERS), Address("logits"))
    return Wiring(writers, readers, _heard(model, writers, readers))


def _by_layer(model: Model, sites: Sequence[str]) -> list[Address]:
    """Return the places of these sites, layer by layer, and heads one by one."""
    patterns = [f"{s}.*" if s.startswith("mlp") else f"{s}.*.*" for s in sites]
    return sorted(model.places(patterns), key=lambda a: a.layer or 0)


def _heard(model: Model, writers: Sequence[Address], readers: Sequence[Address]) -> Bool[Tensor, "writer reader"]:
    """Return which reader hears which writer; heads of a layer are alike."""
    rows, columns = (list(dict.fromkeys(a.place for a in places)) for places in (writers, readers))
    alike = torch.tensor([[precedes(model.anatomy, u, v) for v in columns] for u in rows])
    row, column = ([places.index(a.place) for a in own] for places, own in ((rows, writers), (columns, readers)))
    return alike[row][:, column]
