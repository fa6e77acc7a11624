"""sparsify: a folder for each module (`layers.10`, `layers.10.mlp`) with `cfg.json` and `sae.safetensors`.

`encoder.weight` [latent, width], `encoder.bias`, `W_dec` [latent, width], `b_dec`, optionally `W_skip` [written, read]
(y += x W_skipᵀ). b_dec is subtracted from what is read, except in transcoders. Modules are named by their path in the
Hugging Face model without its head; an autoencoder reads a module's output, a transcoder its input as well.
"""

from __future__ import annotations

from pathlib import Path

from cutaway.core.address import parse
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import Files, asked, taken, write_config, write_plain
from cutaway.dictionaries.formats.shared.simple import Simple, simple, unheld
from cutaway.dictionaries.gates import GroupMax, TopK
from cutaway.models.anatomy.foreign_names import site_of_module

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_INPUTS = {"mlp_out": "mlp_in", "attn_out": "attn_in", "resid_post": "resid_pre"}


def detect(files: Files) -> bool:
    """True if a folder holds a dictionary in this format."""
    return set(files.shapes(WEIGHTS)) >= {"encoder.weight", "encoder.bias", "b_dec"} and bool(files.json(CONFIG))


def read(files: Files, *, site: str | None = None, target: str | None = None) -> Dictionary:
    """Read the dictionary; `site` (and `target`) stand in for what the folder's name says."""
    config, tensors = files.json(CONFIG), files.tensors(WEIGHTS)
    encoder, b_enc, decoder, b_dec = taken(
        files, WEIGHTS, ["encoder.weight", "encoder.bias", "W_dec", "b_dec"], tensors
    )
    coder, kind, k = bool(config.get("transcode")), config.get("activation", "topk"), config.get("k")
    if kind not in ("topk", "groupmax") or config.get("signed") or k is None:
        what = "signed top-k" if config.get("signed") else f"{kind!r} with k = {k}"
        raise Refused(f"dictionary at {str(files.path)!r}", f"its activation {what} is not known", "convert it")
    gate = TopK(int(k), multi=bool(config.get("multi_topk"))) if kind == "topk" else GroupMax(int(k))
    if site is None or (coder and target is None):
        site, target = _named(files, coder, site, target)
    return Simple(
        site,
        target if coder and target else site,
        encoder,
        decoder,
        b_enc,
        b_dec,
        gate,
        tensors.get("W_skip"),
        subtract=not coder,
        about={"format": NAME, "config": config},
    ).dictionary()


def _named(files: Files, coder: bool, site: str | None, target: str | None) -> tuple[str, str]:
    names = [p for p in files.words.split("/") if p != WEIGHTS]
    name = names[-2] if names[-1].startswith("seed") else names[-1]
    try:
        output = site_of_module(name)
    except Refused:
        question = f"the folder's name {name!r} does not say what it reads"
        return asked(site, "site", question, files), asked(
            target or (None if coder else site), "target", question, files
        )
    if not coder:
        return site or str(output), target or str(output)
    inside = _INPUTS[output.site] + f".{output.layer}"
    return site or inside, target or str(output)


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a dictionary as a folder in this format, folded.

    Raises:
        Refused: the format cannot hold it.
    """
    coder = dictionary.reads != dictionary.writes
    s = simple(dictionary, NAME, subtract=not coder, skip=True)
    if not isinstance(s.gate, TopK | GroupMax) or s.encoder is None or s.b_enc is None:
        raise unheld(dictionary, NAME, s.gate)
    top = isinstance(s.gate, TopK)
    config = {
        "activation": "topk" if top else "groupmax",
        "d_in": s.encoder.shape[1],
        "num_latents": len(s.decoder),
        "expansion_factor": max(1, len(s.decoder) // s.encoder.shape[1]),
        "k": s.gate.k,
        "multi_topk": isinstance(s.gate, TopK) and s.gate.multi,
        "normalize_decoder": False,
        "skip_connection": s.skip is not None,
        "transcode": coder,
    }
    tensors = {"encoder.weight": s.encoder, "encoder.bias": s.b_enc, "W_dec": s.decoder, "b_dec": s.b_dec}
    write_plain(Path(path) / WEIGHTS, tensors if s.skip is None else {**tensors, "W_skip": s.skip})
    write_config(Path(path) / CONFIG, config)
    return Path(path)


def folder(dictionary: Dictionary) -> str:
    """Return the name under which a dictionary's folder is expected: the module whose output it writes."""
    a = parse(dictionary.writes[0])
    end = {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".attn"}.get(a.site)
    if end is None:
        raise Refused(f"site {a} as {NAME}", "no module's output is known by that name", "name the folder yourself")
    return f"layers.{a.layer}{end}"
