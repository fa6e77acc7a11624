"""The dictionary: latents that read some sites and write some sites.

One class for all of them. A sparse autoencoder is one block that reads and writes one site; a transcoder reads one and
writes another; a per-layer set has one block per layer; in a cross-layer transcoder block l reads layer l and writes
layers l and up; a crosscoder is one block over many sites. With x̄ the (normalised) activations, on each token

    π_b = Σ_read W_e[b, read] (x̄[read] − p[read]) + b_enc[b]        p = b_dec if `subtract_b_dec`, else 0
    f_b = gate_b(π_b)                                                  gate_b(π_b n_b) / n_b if `norm_aware`
    ŷ[write] = Σ_b f_b W_d[b, write] + b_dec[write] + Σ_read skip[read, write] x̄[read]

and the output of a site is ŷ taken back through that site's normalisation. n_b is the norm of each latent's decoder
rows over all the sites its block writes. Rows are latents everywhere: `encoder[b][read]` is [latent, width].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import split_model
from cutaway.core.record import hash_tensors, hash_text
from cutaway.core.refuse import Refused, nearest
from cutaway.core.repeat import Made
from cutaway.dictionaries import provenance
from cutaway.dictionaries.code import SparseCode, concat_latents, concat_tokens
from cutaway.dictionaries.gates.shared.gate import EncoderGate, Gate, GreedyGate, moved
from cutaway.dictionaries.norms import FixedNorm, Measured, Norm, moved_norm
from cutaway.dictionaries.parts import Block, decoder_norms, described, measured_at
from cutaway.dictionaries.validate import check

K = TypeVar("K")
Acts = Tensor | Mapping[str, Tensor]
_CHUNK = 1 << 24  # pre-activations held at once by `encode`


@dataclass(frozen=True)
class Read:
    """Input of a dictionary at one site.

    Attributes:
        x: normalised values, one row per token.
        measured: what the normalisation measured on each token.
        lead: leading axes of the activations, before they were flattened to tokens.
        shape: shape of the activations as given.
    """

    x: Float[Tensor, "token width"]
    measured: Measured = ()
    lead: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse dictionary as data; see the module's text for the definition. It knows nothing of training."""

    blocks: tuple[Block, ...]
    encoder: tuple[dict[str, Tensor], ...]
    decoder: tuple[dict[str, Tensor], ...]
    b_enc: tuple[Tensor, ...]
    b_dec: dict[str, Tensor]
    gates: tuple[Gate, ...]
    skip: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    subtract_b_dec: bool = False
    norm_aware: bool = False
    reading: dict[str, Norm] = field(default_factory=dict)
    writing: dict[str, Norm] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    made: Made | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check(self)

    # --- what there is

    @property
    def reads(self) -> tuple[str, ...]:
        """Every site that is read, in order."""
        skipped = (read for read, _ in self.skip)
        return tuple(dict.fromkeys([*(r for b in self.blocks for r in b.reads), *skipped]))

    @property
    def writes(self) -> tuple[str, ...]:
        """Every site that is written, in order."""
        return tuple(dict.fromkeys(w for b in self.blocks for w in b.writes))

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models whose sites it uses, in order; empty where sites name none."""
        names = dict.fromkeys(split_model(site)[0] for site in (*self.reads, *self.writes))
        return tuple(n for n in names if n)

    @property
    def n_latents(self) -> int:
        """Latents of all blocks together."""
        return sum(b.n_latents for b in self.blocks)

    @property
    def starts(self) -> tuple[int, ...]:
        """The number, among all latents, of each block's first one; the last entry is `n_latents`."""
        return tuple(accumulate((b.n_latents for b in self.blocks), initial=0))

    @property
    def gate(self) -> Gate:
        """The gate of a dictionary of one block.

        Raises:
            Refused: there are several blocks.
        """
        if len(self.gates) != 1:
            raise Refused("dictionary.gate", f"there are {len(self.gates)} blocks", "use dictionary.gates")
        return self.gates[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(iter(self.b_dec.values())).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(iter(self.b_dec.values())).device

    def width(self, site: str) -> int:
        """Return the width of a site that is read or written."""
        if site in self.b_dec:
            return len(self.b_dec[site])
        for weights in self.encoder:
            if site in weights:
                return weights[site].shape[1]
        for (read, _), matrix in self.skip.items():
            if read == site:
                return matrix.shape[1]
        close = nearest(site, [*self.reads, *self.writes])
        why = "the dictionary does not use it" + (f"; near: {close}" if close else "")
        raise Refused(f"site {site!r}", why, f"it reads {', '.join(self.reads)} and writes {', '.join(self.writes)}")

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(type(g).__name__ for g in self.gates))
        sites = f"{_listed(self.reads)} → {_listed(self.writes)}"
        return f"Dictionary({sites}: {self.n_latents} latents in {len(self.blocks)} block(s), {kinds})"

    # --- running

    def forward(self, acts: Acts) -> Any:
        """Return the reconstruction, with everything in it: decoder, biases, skips and normalisations.

        `acts` is the activation of the one site that is read, or a mapping from sites to activations; leading axes
        are kept, and heads may be flattened or not. A tensor gives a tensor where one site is written, everything
        else a mapping from the sites written.
        """
        reads = self.read(acts)
        out = self.write({b: self._encoded(b, reads) for b in range(len(self.blocks))}, reads)
        return out[self.writes[0]] if isinstance(acts, Tensor) and len(out) == 1 else out

    def encode(self, acts: Acts, block: int | None = None) -> SparseCode:
        """Encode activations: `dictionary.encode(model.capture(prompt, dictionary.reads))`.

        Latents of several blocks follow each other (`starts`). With `block`, only that block is encoded, and only what
        it reads is needed.
        """
        if block is not None:
            return self._encoded(block, self.read(acts, self.blocks[block].reads))
        reads = self.read(acts)
        return concat_latents([self._encoded(b, reads) for b in range(len(self.blocks))])

    def pre_activations(self, block: int, acts: Acts) -> Float[Tensor, "token latent"]:
        """Return the gate's input in one block: π, or π n where gating is norm-aware."""
        if self.gates[block].greedy:
            raise Refused("pre-activations", f"{type(self.gates[block]).__name__} has none", "use encode")
        return self._pre(block, self.read(acts, self.blocks[block].reads))

    def decode(self, code: SparseCode, acts: Acts | None = None) -> Any:
        """Decode a code: return a tensor if one site is written, else a mapping from the sites written.

        `acts` are needed where the dictionary has a skip or measures every token: without them the reconstruction
        would be incomplete.

        Raises:
            Refused: `acts` are needed and missing, or the code has other latents.
        """
        if code.n_latents != self.n_latents:
            raise Refused("code", f"it has {code.n_latents} latents", f"this dictionary has {self.n_latents}")
        if acts is None and (self.skip or any(n.per_token for n in self.writing.values())):
            what = "a skip" if self.skip else "a normalisation that measures every token"
            raise Refused("decode(code)", f"the dictionary has {what}", "give decode(code, acts), or use forward(acts)")
        out = self.write(dict(enumerate(self._split(code))), None if acts is None else self.read(acts))
        return next(iter(out.values())) if len(out) == 1 and not isinstance(acts, Mapping) else out

    def direction(self, latent: int, site: str | None = None) -> Float[Tensor, "width"]:
        """Return what one unit of a latent adds to a site, to steer with or to read: `Add(site, direction, 6.0)`.

        The decoder row, taken back through a fixed normalisation. Under one that measures each token it is the row in
        normalised units.

        Raises:
            Refused: the latent does not exist, or does not write the site (its only one if None).
        """
        block, row = place_of(self, latent)
        writes = self.blocks[block].writes
        if site not in writes and (site is not None or len(writes) != 1):
            what = f"direction of latent {latent}" + (f" at {site}" if site is not None else "")
            raise Refused(what, f"it writes {_listed(writes)}", "name a site that it writes")
        found = self.decoder[block][site or writes[0]][row].to(self._wide)
        norm = self.writing.get(site or writes[0])
        return norm.push(found[None])[0] if isinstance(norm, FixedNorm) else found

    def _split(self, code: SparseCode) -> list[SparseCode]:
        """Split a code into one for each block."""
        if len(self.blocks) == 1:
            return [code]
        device = code.index.device
        return [
            code.select(torch.arange(a, z, device=device)) for a, z in zip(self.starts, self.starts[1:], strict=False)
        ]

    def read(self, acts: Acts, sites: Sequence[str] | None = None) -> dict[str, Read]:
        """Normalise the activations of the sites it reads, one row per token.

        Raises:
            Refused: a site is missing, or an activation has another width.
        """
        sites = self.reads if sites is None else sites
        if isinstance(acts, Tensor):
            if len(sites) != 1:
                raise Refused("acts", f"{len(sites)} sites are read", f"give a mapping with {_listed(sites)}")
            acts = {sites[0]: acts}
        missing = [s for s in sites if s not in acts]
        if missing:
            raise Refused(f"acts of {_listed(tuple(acts))}", f"{missing[0]} is missing", "capture every site it reads")
        return {s: self._read(s, acts[s]) for s in sites}

    def write(
        self, codes: Mapping[int, SparseCode], reads: Mapping[str, Read] | None, sites: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Return the sites written (all, or `sites`), from the codes of their blocks and from the reads."""
        out = {}
        for site in self.writes if sites is None else sites:
            y = self.b_dec[site].to(self._wide)
            for b, block in enumerate(self.blocks):
                if site in block.writes:
                    y = y + codes[b].times(self.decoder[b][site].to(self._wide))
            if reads is not None:
                for (read, write), matrix in self.skip.items():
                    if write == site:
                        y = y + reads[read].x @ matrix.to(self._wide).T
            out[site] = self._back(site, y, reads)
        return out

    # --- other forms of the same dictionary

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dictionary:
        """Return the same dictionary on another device or in another dtype."""

        def by_site(weights: Mapping[K, Tensor]) -> dict[K, Tensor]:
            return {site: t.to(device, dtype) for site, t in weights.items()}

        made = replace(
            self,
            encoder=tuple(by_site(w) for w in self.encoder),
            decoder=tuple(by_site(w) for w in self.decoder),
            b_enc=tuple(t.to(device, dtype) for t in self.b_enc),
            b_dec=by_site(self.b_dec),
            gates=tuple(moved(g, device, dtype) for g in self.gates),
            skip=by_site(self.skip),
            reading={s: moved_norm(n, device, dtype) for s, n in self.reading.items()},
            writing={s: moved_norm(n, device, dtype) for s, n in self.writing.items()},
        )
        return provenance.moved(made, self, device, dtype)

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"latents": self.n_latents}

    def identity(self) -> dict[str, Any]:
        """Return the description of the dictionary for records: name, hash, sites and size."""
        return {
            "name": str(self.about.get("path") or self),
            "hash": self.fingerprint(),
            "reads": list(self.reads),
            "writes": list(self.writes),
            "latents": self.n_latents,
        }

    def fingerprint(self) -> str:
        """Hash everything that determines the map."""
        tensors, header = described(self)
        return hash_text(hash_tensors(tensors), json.dumps({k: v for k, v in header.items() if k != "about"}))

    # --- steps

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _read(self, site: str, x: Tensor) -> Read:
        width = self.width(site)
        lead, size = x.ndim, 1
        while lead > 0 and size < width:
            lead, size = lead - 1, size * x.shape[lead - 1]
        if size != width or lead == x.ndim:
            raise Refused(f"acts of {site}", f"their shape is {tuple(x.shape)}", f"this dictionary reads {width} wide")
        if x.device != self.device:
            raise Refused(f"acts of {site}", f"they are on {x.device}", f"the dictionary is on {self.device}: move one")
        flat, measured = x.reshape(-1, width).to(self._wide), ()
        if site in self.reading:
            flat, measured = self.reading[site].into(flat)
        return Read(flat, measured, tuple(x.shape[:lead]), tuple(x.shape))

    def _encoded(self, b: int, reads: Mapping[str, Read]) -> SparseCode:
        gate, sites = self.gates[b], self.blocks[b].reads
        n = len(reads[sites[0]].x)
        if any(len(reads[s].x) != n for s in sites):
            sizes = ", ".join(f"{s}: {len(reads[s].x)}" for s in sites)
            raise Refused("acts", f"their sites have different numbers of tokens ({sizes})", "give the same tokens")
        step = n if gate.whole_batch or n == 0 else max(1, _CHUNK // self.blocks[b].n_latents)
        if n <= step:
            return self._chunk(b, reads)
        parts = range(0, n, step)
        return concat_tokens([self._chunk(b, {s: Read(reads[s].x[i : i + step]) for s in sites}) for i in parts])

    def _chunk(self, b: int, reads: Mapping[str, Read]) -> SparseCode:
        gate = self.gates[b]
        if isinstance(gate, GreedyGate):
            site = self.blocks[b].reads[0]
            x = reads[site].x - self.b_dec[site].to(self._wide) if self.subtract_b_dec else reads[site].x
            return gate.pursue(x, self.decoder[b][site].to(self._wide))
        assert isinstance(gate, EncoderGate)
        code = gate.take(self._pre(b, reads))
        return code if not self.norm_aware else code.scaled(self._norms(b).reciprocal().nan_to_num(posinf=0.0))

    def _pre(self, b: int, reads: Mapping[str, Read]) -> Float[Tensor, "token latent"]:
        pre: Tensor | None = None
        for site, weights in self.encoder[b].items():
            x = reads[site].x - self.b_dec[site].to(self._wide) if self.subtract_b_dec else reads[site].x
            part = x @ weights.to(self._wide).T
            pre = part.add_(self.b_enc[b].to(self._wide)) if pre is None else pre.add_(part)  # one tensor, no copies
        assert pre is not None, "a gate with an encoder reads a site"
        return pre * self._norms(b) if self.norm_aware else pre

    def _norms(self, b: int) -> Float[Tensor, "latent"]:
        return decoder_norms(self.decoder[b]).to(self._wide)

    def _back(self, site: str, y: Tensor, reads: Mapping[str, Read] | None) -> Tensor:
        if site in self.writing:
            source = measured_at(self.blocks, site)
            y = self.writing[site].back(y, reads[source].measured if reads and source is not None else ())
        if reads is None:
            return y
        if site in reads:
            return y.reshape(reads[site].shape)
        return y.reshape(*next(iter(reads.values())).lead, y.shape[-1])


def place_of(d: Dictionary, latent: int) -> tuple[int, int]:
    """Return the block of a latent (numbered over all blocks), and its number within that block.

    Raises:
        Refused: no such latent.
    """
    if not 0 <= latent < d.n_latents:
        raise Refused(f"latent {latent}", "there is no such latent", f"use 0 to {d.n_latents - 1}")
    b = max(i for i, start in enumerate(d.starts[:-1]) if start <= latent)
    return b, latent - d.starts[b]


def _listed(sites: Sequence[str]) -> str:
    return ", ".join(sites) if len(sites) <= 3 else f"{sites[0]}, … {sites[-1]} ({len(sites)} sites)"
