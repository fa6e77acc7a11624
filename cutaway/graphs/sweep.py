"""Rows of an attribution graph: what every reader reads of every source, by one linear sweep down the layers.

Readers of one position go down together, those of lower layers joining on the way, over the positions up to their own
alone: two matrix products per layer, and no graph of autograd. At each layer the products with what its units, errors
and constants write are the edges. Below the first attention only the embeddings are left to read, which are few: they
are carried up through it instead, once for all readers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.node import Bias, Error, Node, Others
from cutaway.graphs.frozen import Frozen
from cutaway.graphs.units import Units
from cutaway.models.sweep.parts import Parts

_NUMBERS = 1 << 26  # numbers of readers held at once


@dataclass(frozen=True, eq=False)
class Readers:
    """Vectors that read the stream, each before the MLP of its layer at its position.

    Attributes:
        layer: the layer; that from which a sweep begins for readers of the stream before it (the number of layers: of
            the last stream).
        position: the position.
        vector: the reader, its norm folded in.
    """

    layer: Int[Tensor, "row"]
    position: Int[Tensor, "row"]
    vector: Float[Tensor, "row d_model"]

    def take(self, rows: Int[Tensor, "_"]) -> Readers:
        """Return some of the readers."""
        return Readers(self.layer[rows], self.position[rows], self.vector[rows])


@dataclass(frozen=True)
class Columns:
    """The sources of a graph in the order of its columns: units, then what is there of each kind.

    Attributes:
        units: the number of units.
        layers: the number of layers.
        width: the number of positions.
        leading: the number of leading positions.
        positional: 1 if position embeddings are added, else 0.
    """

    units: int
    layers: int
    width: int
    leading: int
    positional: int

    @cached_property
    def starts(self) -> dict[str, int]:
        """The first column of each kind of source."""
        grid = self.layers * self.width
        sizes = {
            "error": grid,
            "others": grid,
            "embed": self.width,
            "pos_embed": self.width * self.positional,
            "mlp_out": self.layers * self.leading,
            "attention bias": self.layers,
            "mlp bias": self.layers,
            "own bias": 1,
        }
        found, at = dict[str, int](), self.units
        for name, size in sizes.items():
            found[name], at = at, at + size
        return found | {"end": at}

    def nodes(self) -> list[Node]:
        """Return the nodes of the sources that are no units."""
        grid = [(i, p) for i in range(self.layers) for p in range(self.width)]
        leading = [(i, p) for i in range(self.layers) for p in range(self.leading)]
        return [
            *(Error(i, p) for i, p in grid),
            *(Others(i, p) for i, p in grid),
            *(Address("embed", position=p) for p in range(self.width)),
            *(Address("pos_embed", position=p) for p in range(self.width * self.positional)),
            *(Address("mlp_out", i, position=p) for i, p in leading),
            *(Bias("attn_out", i) for i in range(self.layers)),
            *(Bias("mlp_out", i) for i in range(self.layers)),
            Bias(),
        ]


class Sweep:
    """The sweep of one run over its units.

    Attributes:
        frozen: the run.
        units: its units.
        columns: the sources.
        top: the number of layers that rows pass.
        kept: rows that are done, where they are kept.
    """

    def __init__(self, frozen: Frozen, units: Units, top: int | None = None, kept: Parts | None = None):
        self.frozen, self.units, self.top = frozen, units, frozen.layers if top is None else top
        self.kept = Parts() if kept is None else kept
        positional = int("pos_embed" in frozen.acts)
        self.columns = Columns(len(units.table), frozen.layers, frozen.width, units.leading, positional)
        self._starts = units.table.starts(frozen.layers, frozen.width).tolist()
        self._carried = self._carry()
        self._filled = [{n for n in ("error", "others") if getattr(w, n).any()} for w in units.written]

    @torch.no_grad()
    def rows(self, readers: Readers, out: Float[Tensor, "row column"] | None = None) -> Float[Tensor, "row column"]:
        """Return what each reader reads of each source, written into `out` if that is given; their own constants
        (`own bias`) are left at zero.
        """
        if out is None:
            out = readers.vector.new_empty(len(readers.layer), self.columns.starts["end"])
        for p in readers.position.unique().tolist():
            mine = (readers.position == p).nonzero()[:, 0]
            mine = mine[readers.layer[mine].argsort(descending=True, stable=True)]
            size = max(1, _NUMBERS // ((p + 1) * readers.vector.shape[1]))
            for some in mine.split(size):
                part = readers.take(some)
                inputs = (part.layer, part.position, part.vector)
                out[some] = self.kept.made(inputs, lambda p=p, part=part: self._at(p, part)).to(out)
        return out

    def _at(self, p: int, readers: Readers) -> Float[Tensor, "row column"]:
        """Return the rows of readers of one position, which are sorted from the last layer down."""
        f, layers = self.frozen, readers.layer.tolist()
        n, width, d = len(layers), p + 1, readers.vector.shape[1]
        rows = torch.zeros(n, self.columns.starts["end"]).to(readers.vector)
        g = torch.zeros(n, width, d).to(readers.vector)
        g[:, p] = readers.vector
        skipped: dict[int, list[Tensor]] = {}
        live, mixed = sum(i >= self.top for i in layers), 0  # rows that have begun; those that read several positions
        for i in reversed(range(self.top)):
            joined = sum(layer >= i for layer in layers)
            self._mlp(i, g[:live], rows[:live], skipped)
            if not f.anatomy.parallel:
                self._skip(i, g, skipped.pop(i, []))
                live = joined
            self._attention(i, g[:live], rows[:live], mixed)
            mixed = live
            if f.anatomy.parallel:  # its MLP reads the stream before attention, too
                self._skip(i, g, skipped.pop(i, []))
                live = joined
        self._tokens(g[:live], rows[:live])
        return rows

    def _mlp(self, i: int, g: Tensor, rows: Tensor, skipped: dict[int, list[Tensor]]) -> None:
        """Read what a layer's MLP writes, and keep what its skips read for their layers."""
        w, at, width = self.units.written[i], self.columns.starts, g.shape[1]
        for q in range(self.columns.leading, width):
            first, end = self._starts[q][w.first], self._starts[q][w.last + 1]
            if end > first:
                rows[:, first:end] += g[:, q] @ w.vectors[q].T
        for name, vectors in (("error", w.error), ("others", w.others)):
            if name in self._filled[i]:
                start = at[name] + i * self.columns.width
                rows[:, start : start + width] = torch.einsum("nqd,qd->nq", g, vectors[:width])
        lead = min(self.columns.leading, width)
        start = at["mlp_out"] + i * self.columns.leading
        rows[:, start : start + lead] = torch.einsum("nqd,qd->nq", g[:, :lead], w.whole[:lead])
        rows[:, at["mlp bias"] + i] = g.flatten(1) @ w.constant[:width].flatten()
        for skip in self.units.skips:
            if skip.written == i:
                through = g @ skip.matrix
                through[:, :lead] = 0.0
                skipped.setdefault(skip.read, []).append(through)

    def _skip(self, i: int, g: Tensor, through: list[Tensor]) -> None:
        """Add to readers what they read through skips that begin at a layer."""
        every = torch.arange(g.shape[1], device=g.device)
        for x in through:
            g[: len(x)] += self.frozen.mlp_readers(i, x.flatten(0, 1), every.repeat(len(x))).view_as(x)

    def _carry(self) -> dict[str, Float[Tensor, "token q_pos d_model"]]:
        """Return what the first attention writes at each position of each embedding; nothing if that does not fit."""
        f, width = self.frozen, self.frozen.width
        vectors = f.embeddings
        if not self.top or width * width * vectors["embed"].shape[1] > _NUMBERS:
            return {}
        alone = torch.eye(width).to(vectors["embed"])[:, :, None]
        return {name: f.attention_of(0, alone * own) for name, own in vectors.items()}

    def _attention(self, i: int, g: Tensor, rows: Tensor, mixed: int) -> None:
        at, width = self.columns.starts, g.shape[1]
        constant = self.frozen.attention[i].constant[:width]
        rows[:, at["attention bias"] + i] = g.flatten(1) @ constant.flatten()
        if i or not self._carried:
            self.frozen.through_attention(i, g, mixed)
            return
        for name, carried in self._carried.items():
            rows[:, at[name] : at[name] + width] = g.flatten(1) @ carried[:width, :width].flatten(1).T

    def _tokens(self, g: Tensor, rows: Tensor) -> None:
        at, width = self.columns.starts, g.shape[1]
        for name, vectors in self.frozen.embeddings.items():
            rows[:, at[name] : at[name] + width] += torch.einsum("nqd,qd->nq", g, vectors[:width])
