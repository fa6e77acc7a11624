"""Connor Kissane's and Rob Krzyzanowski's attention dictionaries: `NAME.pt` with `NAME_cfg.json` beside it.

`W_enc` [width, latent], `W_dec` [latent, width], `b_enc`, `b_dec`, which is subtracted; the gate is ReLU. `act_name` in
the configuration says what is read: z of all heads side by side, or a stream.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cutaway.core.pt import write_pt
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import PT, Files, taken, write_config
from cutaway.dictionaries.formats.shared.simple import Simple, simple, unheld
from cutaway.dictionaries.gates import Relu
from cutaway.models.anatomy.foreign_names import hook_of_site, site_of_hook

NAME = "connor_rob"
_KEYS = ["W_enc", "W_dec", "b_enc", "b_dec"]


def detect(files: Files) -> bool:
    """True if a file, or the only one in a folder, holds a dictionary in this format."""
    file = _file(files)
    shapes = files.shapes(file)
    return "act_name" in _config(files, file) and set(shapes) == set(_KEYS) and shapes["W_enc"][1:] == shapes["b_enc"]


def _file(files: Files) -> str | None:
    return files.only(*(f"*{end}" for end in PT))


def _config(files: Files, file: str | None) -> dict[str, Any]:
    return {} if file is None else files.json(f"{Path(file).stem}_cfg.json")


def read(files: Files, *, site: str | None = None) -> Dictionary:
    """Read the dictionary; `site` stands in for what the configuration says it reads."""
    file = str(_file(files))
    config = _config(files, file)
    encoder, decoder, b_enc, b_dec = taken(files, file, _KEYS, files.tensors(file))
    site = site or str(site_of_hook(str(config["act_name"]))[0])
    return Simple(
        site,
        site,
        encoder.T,
        decoder,
        b_enc,
        b_dec,
        Relu(),
        subtract=True,
        about={"format": NAME, "model": config.get("model_name"), "config": config},
    ).dictionary()


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a dictionary as a folder with `sae.pt` and `sae_cfg.json`, folded.

    Raises:
        Refused: the format cannot hold it.
    """
    s = simple(dictionary, NAME, subtract=True)
    if not isinstance(s.gate, Relu) or s.encoder is None or s.b_enc is None or s.site != s.target:
        raise unheld(dictionary, NAME, s.gate)
    parts = (s.encoder.T.contiguous(), s.decoder, s.b_enc, s.b_dec)
    write_pt(Path(path) / "sae.pt", dict(zip(_KEYS, parts, strict=True)))
    config = {
        "act_name": hook_of_site(s.site),
        "act_size": s.decoder.shape[1],
        "dict_size": len(s.decoder),
        "model_name": s.about.get("model"),
    }
    write_config(Path(path) / "sae_cfg.json", config)
    return Path(path)
