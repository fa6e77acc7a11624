"""Other forms of the same dictionary: folded, joined, cut apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.gates.shared.gate import Gate
from cutaway.dictionaries.norms import FixedNorm, Norm, same
from cutaway.dictionaries.parts import Block, decoder_norms


def one_block(
    reads: Mapping[str, Tensor],
    writes: Mapping[str, Tensor],
    b_enc: Tensor,
    b_dec: Mapping[str, Tensor],
    gate: Gate,
    **settings: Any,
) -> Dictionary:
    """Build a dictionary of one block from its encoder and decoder by site (rows are latents).

    One site read and written: a sparse autoencoder. One read, another written: a transcoder (with `skip=`, a skip
    transcoder). Several of each: a crosscoder.
    """
    block = Block(len(b_enc), tuple(dict.fromkeys(reads or writes)), tuple(writes))
    return Dictionary((block,), (dict(reads),), (dict(writes),), (b_enc,), dict(b_dec), (gate,), **settings)


def autoencoder(
    site: str, encoder: Tensor, decoder: Tensor, b_enc: Tensor, b_dec: Tensor, gate: Gate, **settings: Any
) -> Dictionary:
    """Build a sparse autoencoder of one site; weights are [latent, width]."""
    return one_block({site: encoder}, {site: decoder}, b_enc, {site: b_dec}, gate, **settings)


def together(dictionaries: Sequence[Dictionary]) -> Dictionary:
    """Return the dictionaries that write different sites as one: a per-layer set.

    Raises:
        Refused: none, a site written twice, or settings that differ.
    """
    if not dictionaries:
        raise Refused("together([])", "there is no dictionary", "give at least one")
    first = dictionaries[0]
    written = [w for d in dictionaries for w in d.writes]
    twice = [w for w in written if written.count(w) > 1]
    if twice:
        raise Refused("together", f"{twice[0]} is written by two of them", "join dictionaries of different sites")
    if any((d.subtract_b_dec, d.norm_aware) != (first.subtract_b_dec, first.norm_aware) for d in dictionaries):
        raise Refused("together", "some subtract b_dec or gate on norms and others do not", "fold them first")
    about = [d.about for d in dictionaries]
    return Dictionary(
        *(tuple(x for d in dictionaries for x in getattr(d, n)) for n in ("blocks", "encoder", "decoder", "b_enc")),
        b_dec=_merged([d.b_dec for d in dictionaries]),
        gates=tuple(g for d in dictionaries for g in d.gates),
        skip=_merged([d.skip for d in dictionaries]),
        subtract_b_dec=first.subtract_b_dec,
        norm_aware=first.norm_aware,
        reading=_merged([d.reading for d in dictionaries]),
        writing=_merged([d.writing for d in dictionaries]),
        about=about[0] if all(a == about[0] for a in about) else {"parts": about},
    )


def fold(d: Dictionary) -> Dictionary:
    """Fold every fixed normalisation and norm-aware gating into the weights; the map stays the same.

    Norm-aware latents change their unit: the folded value is f · n, and their decoder rows have norm one. A greedy
    gate keeps its normalisation: its steps would be others in another scale.
    """
    d = _unit_norms(d) if d.norm_aware else d
    greedy = {s for b, g in zip(d.blocks, d.gates, strict=True) if g.greedy for s in b.reads}
    ins = {s: n for s, n in d.reading.items() if isinstance(n, FixedNorm) and s not in greedy}
    outs = {s: n for s, n in d.writing.items() if isinstance(n, FixedNorm) and s not in greedy}
    if not ins and not outs:
        return d
    apart = any(not same(d.reading.get(s), d.writing.get(s)) for s in d.reads)
    if d.subtract_b_dec and (apart or d.skip):  # else what is subtracted and what is added stay one vector
        d = subtracting(d, False)
    encoder, b_enc = [], []
    for weights, bias in zip(d.encoder, d.b_enc, strict=True):
        pulled = {s: ins[s].pull(w) if s in ins else w for s, w in weights.items()}
        if not d.subtract_b_dec:  # the origin's part; with b_dec subtracted it cancels against b_dec's own
            bias = bias - sum(_seen(w, ins[s].origin) for s, w in pulled.items() if s in ins)
        encoder.append(pulled)
        b_enc.append(bias)
    b_dec = {s: outs[s].push(b[None])[0] + outs[s].origin if s in outs else b for s, b in d.b_dec.items()}
    skip = {}
    for (read, write), matrix in d.skip.items():
        moved = ins[read].pull(matrix) if read in ins else matrix
        moved = outs[write].push(moved.T).T if write in outs else moved
        if read in ins:
            b_dec[write] = b_dec[write] - _seen(moved, ins[read].origin)
        skip[read, write] = moved
    return replace(
        d,
        encoder=tuple(encoder),
        b_enc=tuple(b_enc),
        b_dec=b_dec,
        skip=skip,
        decoder=tuple({s: outs[s].push(w) if s in outs else w for s, w in ws.items()} for ws in d.decoder),
        reading={s: n for s, n in d.reading.items() if s not in ins},
        writing={s: n for s, n in d.writing.items() if s not in outs},
    )


def _seen(rows: Tensor, origin: Tensor | float) -> Tensor:
    return rows @ origin if isinstance(origin, Tensor) else rows.sum(1) * origin


def subtracting(d: Dictionary, subtract: bool) -> Dictionary:
    """Return the same map with b_dec subtracted from what is read, or not; the encoders' biases make up for it.

    Raises:
        Refused: it cannot be subtracted, or not be left, without changing the map.
    """
    if d.subtract_b_dec == subtract:
        return d
    if any(g.greedy for g in d.gates) or not set(d.reads) <= set(d.b_dec):
        raise Refused(f"{d!r}", "b_dec is part of how it reads, or of another site", f"subtract_b_dec={not subtract}")
    sign = 1 if subtract else -1
    moved = [b + sign * sum(w @ d.b_dec[s] for s, w in ws.items()) for ws, b in zip(d.encoder, d.b_enc, strict=True)]
    return replace(d, b_enc=tuple(moved), subtract_b_dec=subtract)


def jumping(d: Dictionary) -> Dictionary:
    """Return the same map with every single threshold as one per latent, for formats that know JumpReLUs."""
    wide = torch.promote_types(d.dtype, torch.float32)
    gates = (g.per_latent(b.n_latents, wide, d.device) for g, b in zip(d.gates, d.blocks, strict=True))
    return replace(d, gates=tuple(gates))


def _unit_norms(d: Dictionary) -> Dictionary:
    norms = [decoder_norms(w).to(next(iter(w.values())).dtype) for w in d.decoder]
    inverse = [n.reciprocal().nan_to_num(posinf=0.0) for n in norms]
    return replace(
        d,
        norm_aware=False,
        encoder=tuple({s: t * n[:, None] for s, t in w.items()} for w, n in zip(d.encoder, norms, strict=True)),
        b_enc=tuple(b * n for b, n in zip(d.b_enc, norms, strict=True)),
        decoder=tuple({s: t * i[:, None] for s, t in w.items()} for w, i in zip(d.decoder, inverse, strict=True)),
    )


def _merged(parts: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """Return all entries of several mappings; what two of them hold must be the same."""
    out: dict[Any, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key in out and not (same(out[key], value) if isinstance(value, Norm) else out[key] is value):
                raise Refused("together", f"two of them say different things of {key}", "fold them first")
            out[key] = value
    return out


def alone(d: Dictionary, b: int) -> Dictionary:
    """Return the dictionary of one block; b_dec and skips of the sites it writes go along."""
    one = d.blocks[b]
    return replace(
        d,
        blocks=(one,),
        encoder=(d.encoder[b],),
        decoder=(d.decoder[b],),
        b_enc=(d.b_enc[b],),
        b_dec={w: d.b_dec[w] for w in one.writes},
        gates=(d.gates[b],),
        skip={(r, w): m for (r, w), m in d.skip.items() if w in one.writes},
        reading={s: n for s, n in d.reading.items() if s in one.reads},
        writing={s: n for s, n in d.writing.items() if s in one.writes},
    )
