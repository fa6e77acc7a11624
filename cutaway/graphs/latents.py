"""Latents of transcoders and cross-layer transcoders as units of an attribution graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import parse
from cutaway.core.node import Latent
from cutaway.core.refuse import Refused
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.splice import late_reads
from cutaway.dictionaries.transforms import fold, subtracting
from cutaway.graphs.frozen import Frozen
from cutaway.graphs.units import Skip, Table, Units, Written, latent_node


@dataclass(frozen=True)
class Transcoders:
    """A dictionary whose blocks read one MLP each and write MLPs.

    Attributes:
        dictionary: the dictionary, normalisations folded in.
        reads: the layer that each block reads.
        blocks: the block of each layer that is read.
    """

    dictionary: Dictionary
    reads: tuple[int, ...]

    @cached_property
    def blocks(self) -> dict[int, int]:
        """The block that reads each layer."""
        return {layer: b for b, layer in enumerate(self.reads)}


def as_transcoders(d: Dictionary, layers: int) -> Transcoders:
    """Return a dictionary in the form that graphs need: per-layer (skip) transcoders or cross-layer transcoders.

    Raises:
        Refused: it is something else, or its code of a token is not that token's own linear reading.
    """
    what = f"attribution graph over {d!r}"
    known = "use (skip) transcoders or a cross-layer transcoder: blocks that read mlp_in and write mlp_out"
    ins = [tuple(map(parse, b.reads)) for b in d.blocks]
    outs = [parse(w) for w in d.writes]
    if d.models or any(len(r) != 1 or r[0].site != "mlp_in" for r in ins) or any(w.site != "mlp_out" for w in outs):
        raise Refused(what, f"it reads {', '.join(d.reads[:3])} and writes {', '.join(d.writes[:3])}", known)
    reads = tuple(int(r[0].layer or 0) for r in ins)
    if len(set(reads)) < len(reads) or max([*reads, *(int(w.layer or 0) for w in outs)]) >= layers:
        raise Refused(what, f"its blocks read layers {list(reads)}, of a model of {layers}", "give a block per layer")
    if late := [w for w in d.writes if late_reads(d, w)] or [f"{r}→{w}" for r, w in d.skip if _layer(r) > _layer(w)]:
        raise Refused(what, f"{late[0]} is written before what it is made of can be read", known)
    if any(parse(r).site != "mlp_in" for r, _ in d.skip):
        raise Refused(what, "a skip reads another site than the MLPs", known)
    return Transcoders(subtracting(folded(d, what), False), reads)


def folded(d: Dictionary, what: str) -> Dictionary:
    """Return a dictionary without normalisations, each token's code by itself and linear but for its gate.

    Raises:
        Refused: `what` cannot be done, for it has another gate or a normalisation that measures each token.
    """
    for gate in d.gates:
        if gate.greedy or gate.whole_batch:
            why = "has no linear encoder" if gate.greedy else "chooses among all tokens of a batch"
            raise Refused(what, f"its gate {type(gate).__name__} {why}", "use a dictionary with thresholds or top-k")
    made = fold(d)
    if made.reading or made.writing:
        named = ", ".join(sorted({type(n).__name__ for n in (*made.reading.values(), *made.writing.values())}))
        raise Refused(what, f"its normalisation {named} measures each token", "use one that can be folded")
    return made


def _layer(site: str) -> int:
    return int(parse(site).layer or 0)


class ActiveLatents(Units):
    """The active latents of one run.

    Attributes:
        transcoders: their dictionary.
        frozen: the run.
    """

    def __init__(self, frozen: Frozen, found: Transcoders, leading: int):
        self.frozen, self.transcoders, self.leading = frozen, found, leading
        self.dictionary = d = found.dictionary.to(frozen.model.device, frozen.dtype)
        reads = {r: frozen.at(r) for r in d.reads}
        self.codes = {b: d.encode({r: reads[r] for r in d.blocks[b].reads}, b).csr() for b in range(len(d.blocks))}
        self.table = Table.sorted([self._part(b, code, reads) for b, code in self.codes.items()])
        self.skips = tuple(Skip(_layer(r), _layer(w), m) for (r, w), m in d.skip.items())
        out = d.write(self.codes, d.read(reads)) if d.writes else {}
        starts = self.table.starts(frozen.layers, frozen.width).tolist()
        self.written = [self._written(i, out.get(f"mlp_out.{i}"), starts) for i in range(frozen.layers)]

    def readers(self, units: Int[Tensor, "row"]) -> Float[Tensor, "row d_model"]:
        t, d = self.table, self.dictionary
        out = torch.empty(len(units), self.frozen.model.shape.d_model).to(t.value)
        for layer, block in self.transcoders.blocks.items():
            mine = t.layer[units] == layer
            rows = d.encoder[block][f"mlp_in.{layer}"][t.index[units[mine]]]
            out[mine] = self.frozen.mlp_readers(layer, rows, t.position[units[mine]])
        return out

    def constants(self, units: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        t, d = self.table, self.dictionary
        out = torch.empty(len(units)).to(t.value)
        for layer, block in self.transcoders.blocks.items():
            mine = t.layer[units] == layer
            index = t.index[units[mine]]
            rows = d.encoder[block][f"mlp_in.{layer}"][index]
            out[mine] = d.b_enc[block][index] + rows @ self.frozen.mlp_shift(layer)
        return out

    def node(self, layer: int, index: int, position: int) -> Latent:
        return latent_node(layer, index, position)

    def _part(self, b: int, code: SparseCode, reads: dict[str, Tensor]) -> Table:
        """Return the table of one block's active latents, those at leading positions left out."""
        layer, d = self.transcoders.reads[b], self.dictionary
        kept = code.tokens >= self.leading
        position, index, activation = code.tokens[kept], code.index[kept], code.value[kept]
        (site,) = d.blocks[b].reads
        value = torch.einsum("nd,nd->n", reads[site][position], d.encoder[b][site][index]) + d.b_enc[b][index]
        return Table(torch.full_like(position, layer), position, index, activation, value)

    def _written(self, i: int, reconstruction: Tensor | None, starts: list[list[int]]) -> Written:
        f, d, site, lead = self.frozen, self.dictionary, f"mlp_out.{i}", self.leading
        output = f.at(site)
        writers = [r for r, b in zip(self.transcoders.reads, d.blocks, strict=True) if site in b.writes]
        first, last = (min(writers), max(writers)) if writers else (i, i)
        vectors = [self._vectors(site, slice(starts[q][first], starts[q][last + 1])) for q in range(f.width)]
        constant, error = torch.zeros_like(output), output
        if reconstruction is not None:
            error = output - reconstruction
            shifts = (m @ f.mlp_shift(_layer(r)) for (r, w), m in d.skip.items() if w == site)
            constant = constant + sum(shifts, d.b_dec[site])
        inside = (torch.arange(f.width, device=output.device) >= lead)[:, None]
        nothing = torch.zeros_like(output)
        return Written(first, last, vectors, error * inside, nothing, constant * inside, output[:lead])

    def _vectors(self, site: str, units: slice) -> Float[Tensor, "_ d_model"]:
        """Return what some units write at a site; zero for those of blocks that do not write it."""
        t, d = self.table, self.dictionary
        layer, index = t.layer[units], t.index[units]
        out = torch.zeros(len(index), self.frozen.model.shape.d_model).to(t.value)
        for one in layer.unique().tolist():
            rows = d.decoder[self.transcoders.blocks[one]].get(site)
            if rows is not None:
                out[layer == one] = rows[index[layer == one]]
        return out * t.activation[units, None]
