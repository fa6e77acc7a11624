"""Check that the parts of a dictionary fit together."""

from __future__ import annotations

from torch import Tensor

from cutaway.core.address import parse
from cutaway.core.refuse import Refused
from cutaway.dictionaries.gates.shared.gate import tensors_of
from cutaway.dictionaries.parts import Parts, measured_at


def check(d: Parts) -> None:
    """Refuse a dictionary whose parts do not fit.

    Raises:
        Refused: counts, names or shapes that do not fit, or settings that contradict each other.
    """
    counts = {"encoder": len(d.encoder), "decoder": len(d.decoder), "b_enc": len(d.b_enc), "gates": len(d.gates)}
    wrong = [f"{n} has {c}" for n, c in counts.items() if c != len(d.blocks)]
    if wrong or not d.blocks:
        raise Refused(
            "dictionary", f"{len(d.blocks)} blocks, but {', '.join(wrong) or 'one is needed'}", "one per block"
        )
    for site in dict.fromkeys([*d.reads, *d.writes]):
        parse(site)
    if set(d.b_dec) != set(d.writes):
        raise Refused("b_dec", f"it names {sorted(d.b_dec)}", f"give one bias for each of {', '.join(d.writes)}")
    for b in range(len(d.blocks)):
        _block(d, b)
    for (read, write), matrix in d.skip.items():
        if write not in d.b_dec:
            raise Refused(f"skip {read} → {write}", f"no block writes {write}", "skip to a site that is written")
        _shape(f"skip {read} → {write}", matrix, (d.width(write), d.width(read)))
    unread = [s for s in d.reading if s not in d.reads] + [s for s in d.writing if s not in d.b_dec]
    if unread:
        raise Refused(f"normalisation of {unread[0]}", "the dictionary does not use that site", "leave it out")
    for site, norm in d.writing.items():
        if norm.per_token and (measured_at(d.blocks, site) is None or not same_kind(d, site)):
            why = "its output cannot be taken back: the site it reads is not measured, or several are"
            raise Refused(f"{type(norm).__name__} of {site}", why, "measure the one site that its blocks read")


def same_kind(d: Parts, site: str) -> bool:
    """True if what a written site's normalisation needs is measured where its blocks read."""
    source = measured_at(d.blocks, site)
    return source is not None and type(d.reading.get(source)) is type(d.writing[site])


def _block(d: Parts, b: int) -> None:
    block, gate = d.blocks[b], d.gates[b]
    n, greedy = block.n_latents, gate.greedy
    if not block.reads or not block.writes:
        raise Refused(f"block {b}", "it reads or writes nothing", "name at least one site of each")
    if set(d.encoder[b]) != (set() if greedy else set(block.reads)):
        raise Refused(f"encoder of block {b}", f"it names {sorted(d.encoder[b])}", f"give {', '.join(block.reads)}")
    if set(d.decoder[b]) != set(block.writes):
        raise Refused(f"decoder of block {b}", f"it names {sorted(d.decoder[b])}", f"give {', '.join(block.writes)}")
    for read, w in d.encoder[b].items():
        _shape(f"encoder of {read}", w, (n, d.width(read)))
    for write, w in d.decoder[b].items():
        _shape(f"decoder of {write}", w, (n, len(d.b_dec[write])))
    _shape(f"b_enc of block {b}", d.b_enc[b], (n,))
    for name, t in tensors_of(gate).items():
        _shape(f"{name} of block {b}", t, (n,))
    if greedy and block.reads != block.writes:
        raise Refused(f"block {b}", "a greedy gate reads what it writes", "use another gate")
    if d.norm_aware and not gate.norm_aware:
        raise Refused(f"block {b}", f"norm-aware gating is not defined for {type(gate).__name__}", "norm_aware=False")
    if d.subtract_b_dec and not set(block.reads) <= set(d.b_dec):
        why = f"b_dec would be subtracted from {', '.join(block.reads)}, which it does not belong to"
        raise Refused(f"block {b}", why, "subtract_b_dec=False")


def _shape(what: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(t.shape) != shape:
        raise Refused(what, f"its shape is {tuple(t.shape)}", f"{shape} is needed; rows are latents")
