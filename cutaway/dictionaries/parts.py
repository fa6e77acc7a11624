"""Parts of a dictionary: what its blocks, weights and normalisations are called, and their flat form.

The flat form (`described`) is what files hold and what fingerprints are made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.repeat import Made
from cutaway.dictionaries.gates.shared.gate import Gate, numbers_of, tensors_of
from cutaway.dictionaries.norms import Norm

KIND, VERSION = "dictionary", 1


@dataclass(frozen=True)
class Block:
    """Latents that share what they read and what they write; sites are addresses such as `resid_post.6`."""

    n_latents: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@runtime_checkable
class Parts(Protocol):
    """Protocol of a dictionary's data, for functions that `Dictionary` itself calls."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Blocks in order."""
        ...

    @property
    def encoder(self) -> tuple[dict[str, Tensor], ...]:
        """Encoder of each block by the site read, [latent, width]."""
        ...

    @property
    def decoder(self) -> tuple[dict[str, Tensor], ...]:
        """Decoder of each block by the site written, [latent, width]."""
        ...

    @property
    def b_enc(self) -> tuple[Tensor, ...]:
        """Encoder bias of each block."""
        ...

    @property
    def b_dec(self) -> dict[str, Tensor]:
        """Bias of each site written."""
        ...

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Gate of each block."""
        ...

    @property
    def skip(self) -> dict[tuple[str, str], Tensor]:
        """Linear maps from a site read to a site written."""
        ...

    @property
    def subtract_b_dec(self) -> bool:
        """True if b_dec is subtracted from what is read."""
        ...

    @property
    def norm_aware(self) -> bool:
        """True if gates see pre-activations times the norms of the decoder's rows."""
        ...

    @property
    def reading(self) -> dict[str, Norm]:
        """Normalisation of each site read."""
        ...

    @property
    def writing(self) -> dict[str, Norm]:
        """Normalisation of each site written."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """Settings of its file, ready for JSON."""
        ...

    @property
    def made(self) -> Made | None:
        """The recipe that opens it again."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """Every site read, in order."""
        ...

    @property
    def writes(self) -> tuple[str, ...]:
        """Every site written, in order."""
        ...

    def width(self, site: str) -> int:
        """Return the width of a site that is read or written."""
        ...


def measured_at(blocks: Sequence[Block], write: str) -> str | None:
    """Return the read whose measured numbers take a written site back: itself, or the one site that its blocks read."""
    reads = tuple(dict.fromkeys(r for b in blocks if write in b.writes for r in b.reads))
    return write if write in reads else reads[0] if len(reads) == 1 else None


def decoder_norms(decoder: Mapping[str, Tensor]) -> Float[Tensor, "latent"]:
    """Return the norm of each latent's decoder rows, over all the sites written."""
    squares = [t.to(torch.promote_types(t.dtype, torch.float32)).pow(2).sum(1) for t in decoder.values()]
    return torch.stack(squares).sum(0).sqrt()


def described(d: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a dictionary's tensors by name, and everything else ready for JSON."""
    header: dict[str, Any] = {
        "kind": KIND,
        "version": VERSION,
        "blocks": [{"n_latents": b.n_latents, "reads": b.reads, "writes": b.writes} for b in d.blocks],
        "gates": [numbers_of(g) for g in d.gates],
        "skip": [list(edge) for edge in d.skip],
        "subtract_b_dec": d.subtract_b_dec,
        "norm_aware": d.norm_aware,
        "about": d.about,
    }
    tensors: dict[str, Tensor] = {}
    for b in range(len(d.blocks)):
        tensors |= {f"encoder.{b}.{site}": t for site, t in d.encoder[b].items()}
        tensors |= {f"decoder.{b}.{site}": t for site, t in d.decoder[b].items()}
        tensors[f"b_enc.{b}"] = d.b_enc[b]
        tensors |= {f"gate.{b}.{n}": t for n, t in tensors_of(d.gates[b]).items()}
    tensors |= {f"b_dec.{site}": t for site, t in d.b_dec.items()}
    tensors |= {f"skip.{read}>{write}": t for (read, write), t in d.skip.items()}
    for name, norms in (("reading", d.reading), ("writing", d.writing)):
        header[name] = {site: _numbers(n) for site, n in norms.items()}
        for site, n in norms.items():
            tensors |= {f"{name}.{site}.{k}": t for k, t in _parts(n).items() if isinstance(t, Tensor)}
    return tensors, header


def _parts(norm: Norm) -> dict[str, Any]:
    return {f.name: getattr(norm, f.name) for f in fields(norm)}  # type: ignore[arg-type]


def _numbers(norm: Norm) -> dict[str, Any]:
    return {"kind": type(norm).__name__} | {k: v for k, v in _parts(norm).items() if not isinstance(v, Tensor)}
