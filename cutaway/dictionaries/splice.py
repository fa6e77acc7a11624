"""Splicing a dictionary into a model: its reconstruction takes the place of what the model computed.

    model.run(prompt, edits=Splice(dictionary))                     # x̂ instead of x
    model.run(prompt, edits=Splice(dictionary, error=True, changes=(ablate_latents(17),)))

A splice is one edit like any other: it works in `model.run`, `model.edited`, `model.generate` and the executor, alone
or among others. With `error=True` the reconstruction error x − x̂ is kept, so that only what `changes` do to latents is
seen. A transcoder reads one site and writes another; everything a block reads must come before what it writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address, parse
from cutaway.core.record import hash_text
from cutaway.core.refuse import Refused
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.dictionary import Dictionary, place_of
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.edits.edit import Edit, index_of, indices
from cutaway.models.edits.keep import Read, time_of


@dataclass(frozen=True)
class LatentChange:
    """A change of latents f into factor · f + shift.

    Attributes:
        latents: the latents, numbered over all blocks.
        factor: the factor.
        shift: what is added: one number, or one per latent.
        positions: the positions where they change; None for all.
        silencing: True if nothing is pushed below 0: an active latent falls silent at most, a silent one stays so.
    """

    latents: tuple[int, ...]
    factor: float = 1.0
    shift: float | tuple[float, ...] = 0.0
    positions: tuple[int, ...] | None = None
    silencing: bool = False

    def of(self, old: Float[Tensor, "token latent"]) -> Float[Tensor, "token latent"]:
        """Return the values that take the place of others, in the order of the latents."""
        new = self.factor * old + torch.as_tensor(self.shift, dtype=old.dtype, device=old.device)
        return new.maximum(old.clamp(max=0.0)) if self.silencing else new

    def within(self, first: int, end: int) -> LatentChange:
        """Return the change of those latents alone whose numbers are from `first` to below `end`."""
        own = [n for n, latent in enumerate(self.latents) if first <= latent < end]
        shift = tuple(self.shift[n] for n in own) if isinstance(self.shift, tuple) else self.shift
        return replace(self, latents=tuple(self.latents[n] for n in own), shift=shift)


def ablate_latents(*latents: int, positions: tuple[int, ...] | None = None) -> LatentChange:
    """Make latents inactive."""
    return LatentChange(latents, 0.0, 0.0, positions)


def scale_latents(*latents: int, factor: float, positions: tuple[int, ...] | None = None) -> LatentChange:
    """Multiply latents by a factor."""
    return LatentChange(latents, factor, 0.0, positions)


def set_latents(*latents: int, value: float, positions: tuple[int, ...] | None = None) -> LatentChange:
    """Hold latents at a value, active or not."""
    return LatentChange(latents, 0.0, value, positions)


def add_to_latents(
    *latents: int,
    value: float | tuple[float, ...],
    positions: tuple[int, ...] | None = None,
    silencing: bool = False,
) -> LatentChange:
    """Add a value to latents, or one to each, active or not (steering); silencing, none is pushed below 0."""
    return LatentChange(latents, 1.0, value, positions, silencing)


@dataclass(frozen=True, eq=False)
class Splice(Edit):
    """Edit that puts a dictionary in the place of what it reconstructs.

    Attributes:
        dictionary: the dictionary.
        error: True to keep the reconstruction error, so that only `changes` have an effect.
        changes: what happens to latents.
        positions: the positions where the sites are replaced; None for all.
        writes: the written sites that are replaced; None for all.

    Raises:
        Refused: a code that depends on the batch, a site written before it is read, or a latent that is not there.
    """

    dictionary: Dictionary = field(repr=False)
    error: bool = False
    changes: tuple[LatentChange, ...] = ()
    positions: tuple[int, ...] | None = None
    writes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        d = self.dictionary
        if any(g.whole_batch for g in d.gates):
            why = "its code of a token depends on the other tokens of the batch"
            raise Refused(f"splice of {d!r}", why, "give its BatchTopK gate a threshold")
        if d.models:
            why = f"its sites name models ({', '.join(d.models)}), and a splice is into one model"
            raise Refused(f"splice of {d!r}", why, "encode captured activations")
        strange = [w for w in self._written if w not in d.writes]
        if strange:
            raise Refused(f"splice at {strange[0]}", "the dictionary does not write it", f"use {', '.join(d.writes)}")
        for change in self.changes:
            for latent in change.latents:
                place_of(d, latent)
        for write in self._written:
            late = late_reads(d, write)
            if late:
                why = f"{write} is written before {late[0]} can be read"
                raise Refused(f"splice of {d!r}", why, "give writes= without it, or encode captured activations")

    @property
    def _written(self) -> tuple[str, ...]:
        return self.dictionary.writes if self.writes is None else self.writes

    @property
    def address(self) -> str:  # type: ignore[override]
        return self._written[0]

    def parts(self) -> tuple[Edit, ...]:
        reads = dict.fromkeys(r for w in self._written for r in needed(self.dictionary, w))
        positions = self.positions
        if self.error and positions is None and all(c.positions is not None for c in self.changes):
            positions = tuple(sorted({p for c in self.changes for p in c.positions or ()})) or None
        use = SpliceUse(self, tuple(reads) if self.changes or not self.error else ())
        writes = (SpliceWrite(w, use, positions) for w in self._written)
        return (*(Read(r, use, positions) for r in use.reads), *writes)

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        raise Refused(f"splice of {self.dictionary!r}", "it edits several places", "give it as edits= or to edited()")

    def identity(self) -> str:
        """Hash all that distinguishes this splice, for the files of sweeps."""
        return hash_text(self.dictionary.fingerprint(), repr(self))


def needed(d: Dictionary, write: str) -> tuple[str, ...]:
    """Return the sites from which a written site's reconstruction follows."""
    blocks = [r for b in d.blocks if write in b.writes for r in b.reads]
    return tuple(dict.fromkeys([*blocks, *(r for r, w in d.skip if w == write)]))


def late_reads(d: Dictionary, write: str) -> list[str]:
    """Return the sites that a written site's reconstruction needs, but that a model computes after it."""
    return [r for r in needed(d, write) if time_of(r) > time_of(write)]


@dataclass(frozen=True, eq=False)
class SpliceWrite(Edit):
    """The part of a splice that puts the reconstruction of one site there."""

    local: ClassVar[bool] = False
    address: str
    use: SpliceUse
    positions: tuple[int, ...] | None = None

    @property
    def begins(self) -> Address:
        return min((parse(r) for r in needed(self.use.splice.dictionary, self.address)), key=time_of)

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        whole, there = x.clone(), index_of(self, x, frame, None) or ()
        whole[there] = self.use.output(self.address, x[there], frame).reshape(x[there].shape).to(x.dtype)
        found = indices(self, x, frame)
        if found == [()]:
            return whole
        new = x.clone()
        for i in found:
            new[i] = whole[i]
        return new


class _SpliceState:
    """State of a splice in the current forward, for one variant of the batch.

    Attributes:
        sites: the tensor at each read site, [batch, position, …], with the splice's unit still among others.
        codes: the code of each block, before and after the latents' changes.
    """

    def __init__(self) -> None:
        self.sites: dict[str, Tensor] = {}
        self.codes: dict[int, tuple[SparseCode, SparseCode]] = {}


class SpliceUse:
    """A use of a splice among the edits of a run; its reads leave in the frame's scratch what its writes need.

    Attributes:
        splice: the splice.
        reads: the sites that are read; none where nothing changes.
    """

    def __init__(self, splice: Splice, reads: tuple[str, ...]):
        self.splice, self.reads = splice, reads

    def identity(self) -> str:
        """Return a hash of its splice, which identifies this use."""
        return self.splice.identity()

    def keep(self, site: str, x: Tensor, frame: ForwardFrame) -> None:
        """Keep what stands at a read site."""
        seen = self._seen(frame)
        seen.sites[site] = x[index_of(Read(site, self), x, frame, None) or ()]
        stale = [b for b in seen.codes if site in self.splice.dictionary.blocks[b].reads]
        for b in stale:
            del seen.codes[b]

    def output(self, site: str, old: Float[Tensor, "..."], frame: ForwardFrame) -> Float[Tensor, "..."]:
        """Return what is to stand at a written site, where `old` stands."""
        d, splice = self.splice.dictionary, self.splice
        if not self.reads:
            return old  # the error of an unchanged reconstruction makes it whole again
        seen = self._seen(frame)
        missing = [s for s in needed(d, site) if s not in seen.sites]
        if missing:
            why = f"the model computes {site} before {missing[0]}"
            raise Refused(f"splice of {d!r}", why, "encode captured activations")
        reads = d.read({s: seen.sites[s] for s in needed(d, site)}, needed(d, site))
        codes = {b: self._code(b, seen, frame) for b, block in enumerate(d.blocks) if site in block.writes}
        new = d.write({b: c[1] for b, c in codes.items()}, reads, [site])[site]
        if splice.error:
            kept = d.write({b: c[0] for b, c in codes.items()}, reads, [site])[site]
            new = old + (new - kept).reshape(old.shape).to(old.dtype)
        if site == max(splice._written, key=time_of):
            del frame.scratch[self]
        return new

    def _seen(self, frame: ForwardFrame) -> _SpliceState:
        return frame.scratch.setdefault(self, _SpliceState())

    def _code(self, b: int, seen: _SpliceState, frame: ForwardFrame) -> tuple[SparseCode, SparseCode]:
        if b not in seen.codes:
            d = self.splice.dictionary
            code = changed = d.encode({s: seen.sites[s] for s in d.blocks[b].reads}, block=b)
            for change in self.splice.changes:
                changed = self._changed(b, changed, change, seen, frame)
            seen.codes[b] = code, changed
        return seen.codes[b]

    def _changed(
        self, b: int, code: SparseCode, change: LatentChange, seen: _SpliceState, frame: ForwardFrame
    ) -> SparseCode:
        d, start = self.splice.dictionary, self.splice.dictionary.starts[b]
        change = change.within(start, start + code.n_latents)
        if not change.latents:
            return code
        latents = [i - start for i in change.latents]
        old = code.columns(latents)
        new = change.of(old)
        if change.positions is not None:
            read = Read(str(parse(d.blocks[b].reads[0]).place), self, change.positions)
            x = seen.sites[d.blocks[b].reads[0]]
            mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)  # [batch, position]
            for i in indices(read, mask, frame):
                mask[i[:2]] = True
            new = torch.where(mask.reshape(-1, 1), new, old)
        return code.put(latents, new)
