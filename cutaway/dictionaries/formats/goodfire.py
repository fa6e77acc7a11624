"""Plain linear pairs: Goodfire's (`encoder_linear.*`, `decoder_linear.*`) and the R1 ones (`encoder.*`, `decoder.*`).

One `.pt` file: `encoder….weight` [latent, width], `encoder….bias`, `decoder….weight` [width, latent], `decoder….bias`.
The gate is ReLU, nothing is subtracted. The site is at most in the file's name (`…-SAE-l50.pt`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cutaway.core.pt import write_pt
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import PT, Files, asked, layer_in, taken
from cutaway.dictionaries.formats.shared.simple import Simple, simple, unheld
from cutaway.dictionaries.gates import Relu

NAME = "goodfire"
_NAMES = ("encoder_linear", "decoder_linear"), ("encoder", "decoder")


def _keys(pair: tuple[str, str]) -> list[str]:
    return [f"{part}.{what}" for part in pair for what in ("weight", "bias")]


def detect(files: Files) -> bool:
    """True if a folder or file holds a dictionary in this format."""
    if "trainer" in files.json("config.json"):
        return False  # the same tensors, of a tool that writes down what they are
    shapes = files.shapes(files.only(*(f"*{e}" for e in PT)))
    return all(len(s) < 3 for s in shapes.values()) and any(set(shapes) == set(_keys(pair)) for pair in _NAMES)


def read(files: Files, *, site: str | None = None) -> Dictionary:
    """Read the dictionary; `site` is asked for where the file's name does not tell the layer of a residual stream."""
    file = str(files.only(*(f"*{e}" for e in PT)))
    tensors = files.tensors(file)
    pair = next(p for p in _NAMES if set(tensors) == set(_keys(p)))
    encoder, b_enc, decoder, b_dec = taken(files, file, _keys(pair), tensors)
    layer = layer_in(Path(file).stem, r"(?:^|[-_])l(\d+)$", r"-l(\d+)-")
    site = asked(
        site or (None if layer is None else f"resid_post.{layer}"), "site", "which site it reads is not told", files
    )
    return Simple(site, site, encoder, decoder.T, b_enc, b_dec, Relu(), about={"format": NAME}).dictionary()


def write(dictionary: Dictionary, path: str | Path, names: Literal["linear", "short"] = "linear") -> Path:
    """Write a dictionary as one file; `names` "linear" gives `encoder_linear.…`, "short" gives `encoder.…`.

    Raises:
        Refused: the format cannot hold it.
    """
    s = simple(dictionary, NAME, subtract=False)
    if not isinstance(s.gate, Relu) or s.encoder is None or s.b_enc is None or s.site != s.target:
        raise unheld(dictionary, NAME, s.gate)
    parts = (s.encoder, s.b_enc, s.decoder.T.contiguous(), s.b_dec)
    return write_pt(path, dict(zip(_keys(_NAMES[names == "short"]), parts, strict=True)))
