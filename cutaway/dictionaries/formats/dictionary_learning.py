"""dictionary_learning: `ae.pt` (or `ae_N.pt`) and `config.json`, six classes recognised by their tensors.

    AutoEncoder           bias, encoder.weight [latent, width], encoder.bias, decoder.weight [width, latent]
    AutoEncoderNew        the same with decoder.bias in place of bias, which is not subtracted
    GatedAutoEncoder      decoder_bias, r_mag, gate_bias, mag_bias, encoder.weight, decoder.weight
    AutoEncoderTopK       b_dec, k, threshold, encoder.*, decoder.weight; encodes by top-k, the threshold is not used
    BatchTopKSAE          the same tensors; encodes by the threshold (−1: none yet)
    MatryoshkaBatchTopK   W_enc [width, latent], W_dec [latent, width], b_enc, b_dec, k, threshold, group_sizes
    JumpReluAutoEncoder   W_enc, W_dec, b_enc, b_dec, threshold [latent]; b_dec is not subtracted

Which of the two top-k classes a file is stands only in its configuration. The decoder of AutoEncoder is brought to unit
rows by its own loader; that changes no reconstruction, and is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.core.address import parse
from cutaway.core.pt import write_pt
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import PT, Files, asked, write_config
from cutaway.dictionaries.formats.shared.simple import Simple, simple, unheld
from cutaway.dictionaries.gates import BatchTopK, Gated, JumpRelu, Relu, TopK
from cutaway.dictionaries.transforms import fold, jumping

NAME = "dictionary_learning"
CONFIG = "config.json"
Kind = Literal["AutoEncoderTopK", "BatchTopKSAE"]
_LINEAR = {"encoder.weight", "decoder.weight"}
_FLAT = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
_CLASSES: dict[str, set[str]] = {
    "AutoEncoder": _LINEAR | {"bias", "encoder.bias"},
    "AutoEncoderNew": _LINEAR | {"encoder.bias", "decoder.bias"},
    "GatedAutoEncoder": _LINEAR | {"decoder_bias", "r_mag", "gate_bias", "mag_bias"},
    "TopK": _LINEAR | {"encoder.bias", "b_dec", "k", "threshold"},
    "MatryoshkaBatchTopKSAE": _FLAT | {"k", "group_sizes"},
    "JumpReluAutoEncoder": _FLAT,
}


def detect(files: Files) -> bool:
    """True if a folder or file holds a dictionary in this format."""
    kind = _class(files)
    # What other tools' plain linear pairs look like too is only taken with this tool's configuration beside it.
    return kind is not None and (kind != "AutoEncoderNew" or "trainer" in _config(files))


def _file(files: Files) -> str | None:
    return "ae.pt" if files.path.is_dir() and files.has("ae.pt") else files.only(*(f"*{end}" for end in PT))


def _class(files: Files) -> str | None:
    shapes = files.shapes(_file(files))
    keys = set(shapes)
    if any(len(s) > 2 for s in shapes.values()):
        return None  # a crosscoder of its fork
    return next((n for n, wanted in _CLASSES.items() if keys == wanted), None)


def _config(files: Files) -> dict[str, Any]:
    return files.json(CONFIG) or files.json("../" + CONFIG)


def read(files: Files, *, site: str | None = None, kind: Kind | None = None) -> Dictionary:
    """Read the dictionary; `site` and, between the two top-k classes, `kind` are asked for where no configuration
    tells.
    """
    held, found = files.held(str(_file(files))), _class(files)
    trainer = _config(files).get("trainer", {})
    question = "no configuration tells which site it reads"
    site = asked(site or _named(trainer), "site", question, files)
    about = {"format": NAME, "model": trainer.get("lm_name"), "config": trainer}
    if found == "TopK":
        question = "its file does not tell whether it encodes by top-k or by a threshold"
        found = asked(kind or trainer.get("dict_class"), "kind", question, files)
    made = _MADE.get(str(found))
    if made is None:
        raise Refused(f"dictionary at {str(files.path)!r}", f"class {found} is not known", f"known: {', '.join(_MADE)}")
    encoder, decoder, b_enc, b_dec, gate, subtract = made(held)
    return Simple(site, site, encoder, decoder, b_enc, b_dec, gate, subtract=subtract, about=about).dictionary()


def _named(trainer: Mapping[str, Any]) -> str | None:
    layer, module = trainer.get("layer"), str(trainer.get("submodule_name") or "resid_post")
    known = {
        "resid_post": "resid_post",
        "resid": "resid_post",
        "mlp": "mlp_out",
        "attn": "attn_out",
        "attention": "attn_out",
    }
    name = module.rsplit("_layer_", 1)[0]
    return f"{known[name]}.{layer}" if layer is not None and name in known else None


def _linear(h: Mapping[str, Any], bias: str, gate: Any, subtract: bool) -> tuple[Any, ...]:
    return h["encoder.weight"], h["decoder.weight"].T, h.get("encoder.bias"), h[bias], gate, subtract


def _flat(h: Mapping[str, Any], gate: Any, subtract: bool) -> tuple[Any, ...]:
    return h["W_enc"].T, h["W_dec"], h["b_enc"], h["b_dec"], gate, subtract


def _batch_top_k(h: Mapping[str, Any]) -> BatchTopK:
    threshold = float(h["threshold"])
    return BatchTopK(int(h["k"]), threshold if threshold >= 0 else None)


_MADE = {
    "AutoEncoder": lambda h: _linear(h, "bias", Relu(), True),
    "AutoEncoderNew": lambda h: _linear(h, "decoder.bias", Relu(), False),
    "GatedAutoEncoder": lambda h: _linear(h, "decoder_bias", Gated(h["r_mag"], h["gate_bias"], h["mag_bias"]), True),
    "AutoEncoderTopK": lambda h: _linear(h, "b_dec", TopK(int(h["k"])), True),
    "BatchTopKSAE": lambda h: _linear(h, "b_dec", _batch_top_k(h), True),
    "MatryoshkaBatchTopKSAE": lambda h: _flat(h, _batch_top_k(h), True),
    "JumpReluAutoEncoder": lambda h: _flat(h, JumpRelu(h["threshold"]), False),
}


def write(dictionary: Dictionary, path: str | Path, kind: str | None = None) -> Path:
    """Write a dictionary as a folder in this format, folded; `kind` names the class where several would do.

    Raises:
        Refused: the format cannot hold it.
    """
    gate = fold(dictionary).gates[0]
    kinds = {
        Relu: "AutoEncoder",
        Gated: "GatedAutoEncoder",
        TopK: "AutoEncoderTopK",
        BatchTopK: "BatchTopKSAE",
        JumpRelu: "JumpReluAutoEncoder",
    }
    name = kind or kinds.get(type(gate), "")
    d = jumping(dictionary) if name == "JumpReluAutoEncoder" else dictionary
    s = simple(d, NAME, subtract=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"))
    gate = s.gate
    if s.encoder is None or s.b_enc is None or name not in _MADE or s.site != s.target:
        raise unheld(dictionary, NAME, gate)
    linear = {"encoder.weight": s.encoder, "encoder.bias": s.b_enc, "decoder.weight": s.decoder.T.contiguous()}
    flat = {"W_enc": s.encoder.T.contiguous(), "W_dec": s.decoder, "b_enc": s.b_enc, "b_dec": s.b_dec}
    content: dict[str, Any]
    if isinstance(gate, Relu) and name in ("AutoEncoder", "AutoEncoderNew"):
        content = linear | {"bias" if name == "AutoEncoder" else "decoder.bias": s.b_dec}
    elif isinstance(gate, Gated) and name == "GatedAutoEncoder":
        content = {n: t for n, t in linear.items() if n != "encoder.bias"}
        content |= {"decoder_bias": s.b_dec, "r_mag": gate.r_mag, "gate_bias": gate.b_gate, "mag_bias": gate.b_mag}
    elif isinstance(gate, TopK) and name == "AutoEncoderTopK":
        content = linear | {"b_dec": s.b_dec} | _numbers(gate.k, None)
    elif isinstance(gate, BatchTopK) and name == "BatchTopKSAE":
        content = linear | {"b_dec": s.b_dec} | _numbers(gate.k, gate.threshold)
    elif isinstance(gate, BatchTopK) and name == "MatryoshkaBatchTopKSAE":
        content = flat | _numbers(gate.k, gate.threshold) | {"group_sizes": torch.tensor([len(s.decoder)])}
    elif isinstance(gate, JumpRelu) and name == "JumpReluAutoEncoder":
        content = flat | {"threshold": gate.threshold}
    else:
        raise Refused(
            f"{dictionary!r} as {name}", f"that class has another gate than {type(gate).__name__}", "leave kind="
        )
    address = parse(s.site)
    trainer = {
        "dict_class": name,
        "activation_dim": s.encoder.shape[1],
        "dict_size": len(s.decoder),
        "layer": address.layer,
        "lm_name": s.about.get("model"),
        "submodule_name": _module(s.site),
    }
    write_pt(Path(path) / "ae.pt", content)
    write_config(Path(path) / CONFIG, {"trainer": trainer, "buffer": {}})
    return Path(path)


def _numbers(k: int, threshold: float | None) -> dict[str, Tensor]:
    return {
        "k": torch.tensor(k, dtype=torch.int32),
        "threshold": torch.tensor(-1.0 if threshold is None else threshold),
    }


def _module(site: str) -> str:
    address = parse(site)
    known = {"resid_post": "resid_post", "mlp_out": "mlp", "attn_out": "attn"}
    if address.site not in known or address.unit is not None:
        raise Refused(f"site {site} as {NAME}", "the format has no name for it", "choose another format")
    return f"{known[address.site]}_layer_{address.layer}"
