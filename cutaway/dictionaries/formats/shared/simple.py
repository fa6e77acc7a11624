"""The layout that most formats can hold: one block from one site to one site, its weights as they are stored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cutaway.core.refuse import Code, Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.gates import BatchTopK, Gate, Gated, JumpRelu, TopK
from cutaway.dictionaries.norms import Norm
from cutaway.dictionaries.transforms import fold, one_block, subtracting


@dataclass(frozen=True)
class Simple:
    """A dictionary of one block from one site to one site; `encoder` and `decoder` are [latent, width]."""

    site: str
    target: str
    encoder: Tensor | None
    decoder: Tensor
    b_enc: Tensor | None
    b_dec: Tensor
    gate: Gate
    skip: Tensor | None = None
    subtract: bool = False
    norm_aware: bool = False
    reading: Norm | None = None
    writing: Norm | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def dictionary(self) -> Dictionary:
        """Return the dictionary itself, in single precision or better."""
        wide = torch.promote_types(self.decoder.dtype, torch.float32)
        n = len(self.decoder)
        b_enc = self.b_enc if self.b_enc is not None else self.decoder.new_zeros(n)
        made = one_block(
            {} if self.encoder is None else {self.site: self.encoder.contiguous()},
            {self.target: self.decoder.contiguous()},
            b_enc,
            {self.target: self.b_dec},
            self.gate,
            skip={} if self.skip is None else {(self.site, self.target): self.skip.contiguous()},
            subtract_b_dec=self.subtract,
            norm_aware=self.norm_aware,
            reading={} if self.reading is None else {self.site: self.reading},
            writing={} if self.writing is None else {self.target: self.writing},
            about=self.about,
        )
        return made.to(dtype=wide)


def simple(d: Dictionary, what: str, subtract: bool | None = None, skip: bool = False, norms: bool = False) -> Simple:
    """Return a dictionary as one plain block, folded; `subtract` brings it to a form in which b_dec is subtracted or
    not.

    Raises:
        Refused: the format (`what`) cannot hold it.
    """
    d = fold(d)
    if len(d.blocks) != 1 or len(d.blocks[0].reads) != 1 or len(d.blocks[0].writes) != 1:
        raise Refused(f"{d!r} as {what}", "the format holds one block from one site to one site", "write its blocks")
    site, target = d.blocks[0].reads[0], d.blocks[0].writes[0]
    if d.skip and not skip:
        raise Refused(f"{d!r} as {what}", "the format has no skip", "choose another format")
    if (d.reading or d.writing) and not norms:
        raise Refused(f"{d!r} as {what}", "the format cannot normalise single tokens", "choose another format")
    if subtract is not None:
        d = subtracting(d, subtract and site == target)
    gate, b_enc = d.gate, d.b_enc[0]
    negative = isinstance(gate, JumpRelu) and gate.signed and bool((gate.threshold < 0).any())
    if negative or (isinstance(gate, TopK) and gate.signed):
        raise Refused(f"{d!r} as {what}", "the format has no gate that passes negative values", "choose another format")
    if isinstance(gate, Gated):  # formats have its two biases only
        b_mag = gate.b_mag + gate.r_mag.exp() * b_enc
        gate, b_enc = replace(gate, b_gate=gate.b_gate + b_enc, b_mag=b_mag), torch.zeros_like(b_enc)
    return Simple(
        site,
        target,
        d.encoder[0].get(site),
        d.decoder[0][target],
        b_enc,
        d.b_dec[target],
        gate,
        d.skip.get((site, target)),
        d.subtract_b_dec,
        d.norm_aware,
        d.reading.get(site),
        d.writing.get(target),
        d.about,
    )


def unheld(d: Dictionary, what: str, gate: Gate) -> Refused:
    """Return the refusal of a gate that a format does not know."""
    name = type(gate).__name__
    if isinstance(gate, BatchTopK) and gate.threshold is None:
        name += " without a threshold, which compares the tokens of a batch"
    return Refused(f"{d!r} as {what}", f"the format has no gate {name}", "choose another format")


def before_weight(d: Dictionary, site: str, weight: Tensor, bias: Tensor | None = None) -> Dictionary:
    """Return a dictionary trained on a norm's output before its weight and bias, made to read the site after them.

    (x − bias) / weight is what it was trained on; the division is moved into the encoder and skip, exactly.

    Raises:
        Refused: a weight of zero somewhere, or of another width.
    """
    if tuple(weight.shape) != (d.width(site),) or not bool((weight != 0).all()):
        raise Refused(f"norm weight for {site}", "it has another width, or a zero", "give the weight as it multiplies")
    weight = weight.to(d.device, d.dtype)
    shift = torch.zeros_like(weight) if bias is None else bias.to(d.device, d.dtype)
    if site in d.reading:
        raise Refused(
            f"norm weight for {site}", "what is read is normalised once more", Code("fold the dictionary first")
        )
    b_dec, skip = dict(d.b_dec), dict(d.skip)
    for (read, write), matrix in d.skip.items():
        if read == site:
            skip[read, write] = matrix / weight
            b_dec[write] = b_dec[write] - skip[read, write] @ shift
    encoder = tuple({s: w / weight if s == site else w for s, w in ws.items()} for ws in d.encoder)
    moved = [b - ws[site] @ shift if site in ws else b for ws, b in zip(encoder, d.b_enc, strict=True)]
    return replace(d, encoder=encoder, b_enc=tuple(moved), b_dec=b_dec, skip=skip)
