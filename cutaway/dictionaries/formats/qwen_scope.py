"""Qwen Scope: `layer{n}.sae.pt` with `W_enc` [latent, width], `W_dec` [width, latent], `b_enc`, `b_dec`.

The gate is top-k and nothing is subtracted; k stands in the repository's name only (`…-W32K-L0_50`).
"""

from __future__ import annotations

from pathlib import Path

from cutaway.core.pt import write_pt
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import PT, Files, asked, layer_in, taken
from cutaway.dictionaries.formats.shared.simple import Simple, simple, unheld
from cutaway.dictionaries.gates import TopK

NAME = "qwen_scope"
_KEYS = ["W_enc", "W_dec", "b_enc", "b_dec"]


def detect(files: Files) -> bool:
    """True if a folder or file holds a dictionary in this format."""
    shapes = files.shapes(files.only(*(f"*{e}" for e in PT)))
    return set(shapes) == set(_KEYS) and shapes["W_enc"][:1] == shapes["b_enc"]


def read(files: Files, *, site: str | None = None, k: int | None = None) -> Dictionary:
    """Read the dictionary; `site` and `k` are asked for where the path does not tell them."""
    file = str(files.only(*(f"*{e}" for e in PT)))
    encoder, decoder, b_enc, b_dec = taken(files, file, _KEYS, files.tensors(file))
    if tuple(decoder.shape) != (len(b_dec), len(b_enc)):
        raise Refused(f"file {file!r}", f"its W_dec is {tuple(decoder.shape)}", "this format has [width, latent]")
    layer = layer_in(file, r"layer(\d+)\.sae")
    found = site or (None if layer is None else f"resid_post.{layer}")
    site = asked(found, "site", "which site it reads is not in the file's name", files)
    k = k if k is not None else layer_in(files.words, r"-L0_(\d+)")
    k = asked(k, "k", "how many latents are active is not in its path", files)
    return Simple(
        site, site, encoder, decoder.T, b_enc, b_dec, TopK(k), about={"format": NAME, "declared_l0": k}
    ).dictionary()


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a dictionary as one file; its path must tell layer and k.

    Raises:
        Refused: the format cannot hold it.
    """
    s = simple(dictionary, NAME, subtract=False)
    if not isinstance(s.gate, TopK) or s.encoder is None or s.b_enc is None or s.site != s.target:
        raise unheld(dictionary, NAME, s.gate)
    return write_pt(path, {"W_enc": s.encoder, "W_dec": s.decoder.T.contiguous(), "b_enc": s.b_enc, "b_dec": s.b_dec})
