"""Dictionaries on disk in the house's own format: one safetensors file, its header JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from cutaway.core.files import LARGE, held, read_tensors, reading, write_tensors
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.gates import forms_of, gate_of
from cutaway.dictionaries.norms import NORMS, Norm
from cutaway.dictionaries.parts import KIND, VERSION, Block, described
from cutaway.dictionaries.provenance import opened


def save(dictionary: Dictionary, path: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write a dictionary as one file, in another dtype if asked.

    Raises:
        Refused: the file cannot be written.
    """
    d = dictionary if dtype is None else dictionary.to(dtype=dtype)
    return write_tensors(path, *described(d))


def open_dictionary(path: str | Path, dtype: torch.dtype | None = None) -> Dictionary:
    """Read a dictionary that `save` wrote; weights in half precision become float32 unless `dtype` says otherwise.

    Raises:
        Refused: the file is missing, or holds something else.
    """
    tensors, header = read_tensors(path)
    if header.get("kind") != KIND or header.get("version") != VERSION:
        what = f"{header.get('kind')!r}, version {header.get('version')!r}"
        raise Refused(f"file {str(path)!r}", f"it holds {what}", "dictionaries.load reads the other formats")
    with reading(path):
        d = _made(tensors, header)
    wanted = dtype or torch.promote_types(d.dtype, torch.float32)
    return opened(d if d.dtype == wanted else d.to(dtype=wanted), path, dtype)


def _made(tensors: dict[str, Tensor], header: dict[str, Any]) -> Dictionary:
    """Return the dictionary that tensors and a header describe.

    Raises:
        ValueError, KeyError, TypeError: the header holds something else.
    """
    written = [_block(b) for b in held(header, "blocks", list)]
    blocks = tuple(Block(n, tuple(reads), tuple(writes)) for n, reads, writes in written)
    gates = [_typed(forms_of(held(g, "kind", str)).frozen, g) for g in held(header, "gates", list)]
    if len(gates) != len(blocks):
        raise ValueError(f"there are {len(blocks)} blocks and {len(gates)} gates")
    return Dictionary(
        blocks,
        tuple(_under(tensors, f"encoder.{b}.", block.reads) for b, block in enumerate(blocks)),
        tuple(_under(tensors, f"decoder.{b}.", block.writes) for b, block in enumerate(blocks)),
        tuple(tensors[f"b_enc.{b}"] for b in range(len(blocks))),
        _under(tensors, "b_dec."),
        tuple(gate_of(g, _under(tensors, f"gate.{b}.")) for b, g in enumerate(gates)),
        {(r, w): tensors[f"skip.{r}>{w}"] for r, w in held(header, "skip", list)},
        held(header, "subtract_b_dec", bool),
        held(header, "norm_aware", bool),
        _norms(tensors, header, "reading"),
        _norms(tensors, header, "writing"),
        held(header, "about", dict),
    )


def _block(b: Any) -> tuple[int, list[str], list[str]]:
    reads, writes = held(b, "reads", list), held(b, "writes", list)
    if not all(isinstance(site, str) for site in (*reads, *writes)):
        raise ValueError(f"a site is no text: {[*reads, *writes]!r:.60}")
    return held(b, "n_latents", int), reads, writes


def _typed(kind: type, numbers: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a gate or a normalisation, each of the type that its class says."""
    hints = get_type_hints(kind)
    for name, value in numbers.items():
        allowed = [get_origin(k) or k for k in get_args(hints.get(name)) or [hints.get(name)]]
        allowed += [int] if float in allowed else []
        plain = tuple(k for k in allowed if isinstance(k, type))
        if plain and (not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain)):
            raise ValueError(f"{name!r} of {kind.__name__} is {value!r:.60}")
        if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= LARGE):
            raise ValueError(f"{name!r} of {kind.__name__} is {value}")
    return numbers


def _under(tensors: dict[str, Tensor], prefix: str, order: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the tensors whose names begin so, by the rest of the name; sums over sites are taken in the order they
    had.
    """
    found = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
    return {n: found[n] for n in (*(o for o in order if o in found), *(n for n in found if n not in order))}


def _norms(tensors: dict[str, Tensor], header: dict[str, Any], name: str) -> dict[str, Norm]:
    out = {}
    for site, numbers in held(header, name, dict).items():
        if held(numbers, "kind", str) not in NORMS:
            raise Refused(f"normalisation {numbers['kind']!r}", "none has that name", f"use one of {', '.join(NORMS)}")
        numbers_only = {k: v for k, v in _typed(NORMS[numbers["kind"]], numbers).items() if k != "kind"}
        out[site] = NORMS[numbers["kind"]](**numbers_only, **_under(tensors, f"{name}.{site}."))
    return out
