"""Dictionaries on disk in the house's own format: one safetensors file, its header JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.core.files import read_tensors, write_tensors
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Block, Dictionary
from cutaway.dictionaries.gates import gate_of, numbers_of, tensors_of
from cutaway.dictionaries.norms import NORMS, Norm

KIND, VERSION = "dictionary", 1


def save(dictionary: Dictionary, path: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write a dictionary as one file, in another dtype if asked.

    Raises:
        Refused: the file cannot be written.
    """
    d = dictionary if dtype is None else dictionary.to(dtype=dtype)
    return write_tensors(path, *described(d))


def described(d: Dictionary) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A dictionary's tensors by name, and everything else ready for JSON."""
    header: dict[str, Any] = {
        "kind": KIND, "version": VERSION,
        "blocks": [{"n_latents": b.n_latents, "reads": b.reads, "writes": b.writes} for b in d.blocks],
        "gates": [numbers_of(g) for g in d.gates],
        "skip": [list(edge) for edge in d.skip],
        "subtract_b_dec": d.subtract_b_dec, "norm_aware": d.norm_aware, "about": d.about,
    }  # fmt: skip
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


def open_dictionary(path: str | Path, dtype: torch.dtype | None = None) -> Dictionary:
    """Read a dictionary that `save` wrote; weights in half precision become float32 unless `dtype` says otherwise.

    Raises:
        Refused: the file is missing, or holds something else.
    """
    tensors, header = read_tensors(path)
    if header.get("kind") != KIND or header.get("version") != VERSION:
        what = f"{header.get('kind')!r}, version {header.get('version')!r}"
        raise Refused(f"file {str(path)!r}", f"it holds {what}", "dictionaries.load reads the other formats")
    blocks = tuple(Block(b["n_latents"], tuple(b["reads"]), tuple(b["writes"])) for b in header["blocks"])
    try:
        d = Dictionary(
            blocks,
            tuple(_under(tensors, f"encoder.{b}.", block.reads) for b, block in enumerate(blocks)),
            tuple(_under(tensors, f"decoder.{b}.", block.writes) for b, block in enumerate(blocks)),
            tuple(tensors[f"b_enc.{b}"] for b in range(len(blocks))),
            _under(tensors, "b_dec."),
            tuple(gate_of(g, _under(tensors, f"gate.{b}.")) for b, g in enumerate(header["gates"])),
            {(r, w): tensors[f"skip.{r}>{w}"] for r, w in header["skip"]},
            header["subtract_b_dec"], header["norm_aware"],
            _norms(tensors, header, "reading"), _norms(tensors, header, "writing"), header["about"],
        )  # fmt: skip
    except KeyError as missing:
        raise Refused(f"file {str(path)!r}", f"{missing} is missing in it", "write it again") from missing
    wanted = dtype or torch.promote_types(d.dtype, torch.float32)
    from cutaway.dictionaries.made import opened

    return opened(d if d.dtype == wanted else d.to(dtype=wanted), path, dtype)


def _under(tensors: dict[str, Tensor], prefix: str, order: Sequence[str] = ()) -> dict[str, Tensor]:
    """Tensors whose names begin so, by the rest of the name; sums over sites are taken in the order they had."""
    found = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
    return {n: found[n] for n in (*(o for o in order if o in found), *(n for n in found if n not in order))}


def _parts(norm: Norm) -> dict[str, Any]:
    return {f.name: getattr(norm, f.name) for f in fields(norm)}  # type: ignore[arg-type]


def _numbers(norm: Norm) -> dict[str, Any]:
    return {"kind": type(norm).__name__} | {k: v for k, v in _parts(norm).items() if not isinstance(v, Tensor)}


def _norms(tensors: dict[str, Tensor], header: dict[str, Any], name: str) -> dict[str, Norm]:
    out = {}
    for site, numbers in header[name].items():
        if numbers["kind"] not in NORMS:
            raise Refused(f"normalisation {numbers['kind']!r}", "none has that name", f"use one of {', '.join(NORMS)}")
        numbers_only = {k: v for k, v in numbers.items() if k != "kind"}
        out[site] = NORMS[numbers["kind"]](**numbers_only, **_under(tensors, f"{name}.{site}."))
    return out
