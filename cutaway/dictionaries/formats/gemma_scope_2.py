"""Gemma Scope 2: `params.safetensors` with `w_enc` [width, latent], `w_dec` [latent, width], `b_enc`, `b_dec`,
`threshold`, optionally `affine_skip_connection` [read, written] (y += x A), and a `config.json` that may be missing.

Cross-layer transcoders lie in one folder as `params_layer_{i}.safetensors`, their `w_dec` [latent, layer, width] with
one slice for each of all layers, of which those from i on are used. Transcoders read the norm's output with its weight.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.core.address import parse
from cutaway.core.refuse import Keyword, Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import Files, asked, layer_in, taken, write_config, write_plain
from cutaway.dictionaries.formats.shared.simple import Simple, simple, unheld
from cutaway.dictionaries.gates import JumpRelu
from cutaway.dictionaries.parts import Block
from cutaway.dictionaries.transforms import fold, jumping

NAME = "gemma_scope_2"
_NEEDED = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
_SKIP = "affine_skip_connection"
_MODULES = {
    "self_attn.o_proj.input": "z",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
    "output": "resid_post",
}
_FOLDERS = {"resid_post": "resid_post", "attn_out": "z", "mlp_out": "mlp_out"}
_LAYER_FILE = re.compile(r"params_layer_(\d+)\.safetensors")


def detect(files: Files) -> bool:
    """True if a folder or file holds a dictionary in this format."""
    file = files.only("*.safetensors") or next(iter(_layers(files).values()), None)
    shapes = files.shapes(file)
    return set(shapes) - {_SKIP} == set(_NEEDED) and len(shapes["w_enc"]) == 2


def read(files: Files, *, site: str | None = None, target: str | None = None) -> Dictionary:
    """Read the dictionary; `site` and `target` are asked for where neither a configuration nor the path tells them."""
    layers = _layers(files)
    if layers and (files.path.is_dir() or len(files.shapes(files.path.name)["w_dec"]) == 3):
        return _cross_layer(files, layers)
    file = str(files.only("*.safetensors"))
    tensors = files.tensors(file)
    encoder, decoder, b_enc, b_dec, threshold = taken(files, file, _NEEDED, tensors)
    if decoder.ndim == 3:
        raise Refused(f"file {file!r}", "it is one layer of a cross-layer transcoder", "give the folder of all layers")
    config = files.json("config.json")
    found = _sites(config, files.words)
    site = asked(site or found[0], "site", "which site it reads is neither in a configuration nor in its path", files)
    skip = tensors.get(_SKIP)
    return Simple(
        site,
        target or found[1] or site,
        encoder.T,
        decoder,
        b_enc,
        b_dec,
        JumpRelu(threshold),
        None if skip is None else skip.T,
        about={"format": NAME, "model": config.get("model_name")},
    ).dictionary()


def _layers(files: Files) -> dict[int, str]:
    names = [p.name for p in files.root.glob("params_layer_*.safetensors")]
    return dict(sorted((int(m[1]), n) for n in names if (m := _LAYER_FILE.fullmatch(n))))


def _sites(config: dict[str, Any], words: str) -> tuple[str | None, str | None]:
    inside = config.get("hf_hook_point_in")
    if inside:
        out = config.get("hf_hook_point_out")
        return _module(str(inside)), _module(str(out)) if out else None
    layer = layer_in(words, r"layer_(\d+)")
    kinds = [n for n in (*_FOLDERS, "transcoder") if re.search(rf"/{n}", words)]
    if layer is None or not kinds:
        return None, None
    if kinds[-1] == "transcoder":
        return f"mlp_in.{layer}", f"mlp_out.{layer}"
    return f"{_FOLDERS[kinds[-1]]}.{layer}", None


def _module(path: str) -> str:
    layer = layer_in(path, r"layers\.(\d+)\.")
    for end, site in _MODULES.items():
        if layer is not None and path.endswith(f"layers.{layer}.{end}"):
            return f"{site}.{layer}"
    raise Refused(
        f"module {path!r}",
        "it is no site known by that name",
        ("give ", Keyword("site"), " (and ", Keyword("target"), ")"),
    )


def _cross_layer(files: Files, layers: dict[int, str]) -> Dictionary:
    if list(layers) != list(range(len(layers))):
        raise Refused(f"folder {str(files.root)!r}", f"it has layers {list(layers)}", "fetch all layers, from 0 on")
    n = len(layers)
    reads, writes = [f"mlp_in.{i}" for i in range(n)], [f"mlp_out.{i}" for i in range(n)]
    encoder, decoder, b_enc, b_dec, gates, skip = [], [], [], {}, [], {}
    for i, file in layers.items():
        tensors = files.tensors(file)
        e, d, b, out, threshold = taken(files, file, _NEEDED, tensors)
        if d.ndim != 3 or d.shape[1] != n:
            why = f"{file} writes {d.shape[1] if d.ndim == 3 else 1} layers where the folder has {n}"
            raise Refused(f"folder {str(files.root)!r}", why, "fetch all layers")
        encoder.append({reads[i]: e.T.contiguous()})
        decoder.append({writes[m]: d[:, m].contiguous() for m in range(i, n)})
        b_enc.append(b)
        b_dec[writes[i]] = out
        gates.append(JumpRelu(threshold))
        if _SKIP in tensors:
            skip[reads[i], writes[i]] = tensors[_SKIP].T.contiguous()
    blocks = tuple(Block(len(b_enc[i]), (reads[i],), tuple(writes[i:])) for i in range(n))
    d = Dictionary(
        blocks,
        tuple(encoder),
        tuple(decoder),
        tuple(b_enc),
        b_dec,
        tuple(gates),
        skip,
        about={"format": NAME, "model": files.json("config.json").get("model_name")},
    )
    return d.to(dtype=torch.promote_types(d.dtype, torch.float32))


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a dictionary as a folder in this format, folded; cross-layer transcoders of layers 0 … n − 1 too.

    Raises:
        Refused: the format cannot hold it.
    """
    dictionary = jumping(dictionary)
    if len(dictionary.blocks) > 1:
        return _write_layers(fold(dictionary), Path(path))
    s = simple(dictionary, NAME, subtract=False, skip=True)
    if not isinstance(s.gate, JumpRelu) or s.encoder is None or s.b_enc is None:
        raise unheld(dictionary, NAME, s.gate)
    tensors = {
        "w_enc": s.encoder.T,
        "w_dec": s.decoder,
        "b_enc": s.b_enc,
        "b_dec": s.b_dec,
        "threshold": _passing(dictionary, s.gate),
    }
    if s.skip is not None:
        tensors[_SKIP] = s.skip.T
    write_plain(Path(path) / "params.safetensors", tensors)
    config = {
        "architecture": "jump_relu",
        "model_name": s.about.get("model"),
        "hf_hook_point_in": _path(s.site),
        "affine_connection": s.skip is not None,
    }
    if s.target != s.site:
        config["hf_hook_point_out"] = _path(s.target)
    write_config(Path(path) / "config.json", config)
    return Path(path)


def _path(site: str) -> str:
    a, ends = parse(site), {site: end for end, site in _MODULES.items()}
    if a.site not in ends or a.unit is not None:
        raise Refused(f"site {site} as {NAME}", "the format has no name for it", "choose another format")
    return f"model.layers.{a.layer}.{ends[a.site]}"


def _passing(d: Dictionary, gate: JumpRelu) -> Tensor:
    if gate.signed and bool((gate.threshold < 0).any()):
        raise Refused(f"{d!r} as {NAME}", "it passes negative values", "choose another format")
    return gate.threshold


def _write_layers(d: Dictionary, path: Path) -> Path:
    n = len(d.blocks)
    reads, writes = [f"mlp_in.{i}" for i in range(n)], [f"mlp_out.{i}" for i in range(n)]
    fits = all(b.reads == (reads[i],) and set(b.writes) == set(writes[i:]) for i, b in enumerate(d.blocks))
    if not fits or any(r[7:] != w[8:] for r, w in d.skip) or d.reading or d.subtract_b_dec:
        raise Refused(f"{d!r} as {NAME}", "the format holds cross-layer transcoders of MLPs only", "write its blocks")
    for i in range(n):
        gate = d.gates[i]
        if not isinstance(gate, JumpRelu):
            raise unheld(d, NAME, gate)
        none = torch.zeros_like(d.decoder[i][writes[i]])
        slices = [d.decoder[i].get(w, none) for w in writes]
        tensors = {
            "w_enc": d.encoder[i][reads[i]].T,
            "w_dec": torch.stack(slices, 1),
            "b_enc": d.b_enc[i],
            "b_dec": d.b_dec[writes[i]],
            "threshold": _passing(d, gate),
        }
        if (reads[i], writes[i]) in d.skip:
            tensors[_SKIP] = d.skip[reads[i], writes[i]].T
        write_plain(path / f"params_layer_{i}.safetensors", tensors)
    return path
