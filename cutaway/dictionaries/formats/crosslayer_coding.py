"""crosslayer-coding: cross-layer transcoders as `cfg.json` and one file of weights, `model.safetensors` or `clt.pt`.

    encoders.i.weight [latent, width], encoders.i.bias_param, log_threshold [layer, latent]
    decoders.s->t.weight [width, latent], decoders.s->t.bias_param (all sources' biases are added)
    or tied: decoders.i.*, of each source or of each target (`decoder_tying`), with feature_scale.t [latent]
    skip_weights.s->t [width, width], tied only from each layer to itself: y += x Wᵀ

Names may begin with the module they lie in (`encoder_module.`). θ = exp(log_threshold), and what equals it passes
there. Which sites are read and written is not in the files, and neither are the statistics by which activations were
normalised for training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.core.address import parse
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import PT, Files, asked, taken, write_config, write_plain
from cutaway.dictionaries.formats.shared.simple import unheld
from cutaway.dictionaries.gates import JumpRelu, Relu
from cutaway.dictionaries.parts import Block
from cutaway.dictionaries.transforms import fold, jumping, subtracting

NAME = "crosslayer_coding"
CONFIG, WEIGHTS = "cfg.json", "model.safetensors"
_MODULES = ("encoder_module.", "decoder_module.", "theta_manager.")
_OLD = "encoder_module.feature_"


def detect(files: Files) -> bool:
    """True if a folder holds a dictionary in this format."""
    keys = {_short(n) for n in files.shapes(_file(files))}
    return "num_features" in files.json(CONFIG) and "encoders.0.weight" in keys


def _file(files: Files) -> str | None:
    return files.only("*.safetensors") or files.only(*(f"*{end}" for end in PT))


def _short(name: str) -> str:
    return name if name.startswith(_OLD) else name.removeprefix(next((m for m in _MODULES if name.startswith(m)), ""))


def read(
    files: Files, *, site: str | None = None, target: str | None = None, normalised: Literal["before"] | None = None
) -> Dictionary:
    """Read the cross-layer transcoder; `site` and `target` name what each layer reads and writes (`mlp_in`,
    `mlp_out`).

    `normalised="before"` says that activations will be brought into the scale of training before they are given.
    """
    file, config = str(_file(files)), files.json(CONFIG)
    t = {_short(n).replace("bias_param", "bias"): v.float() for n, v in files.tensors(file).items()}
    reads = asked(site, "site", "which site each layer reads is not in its files", files)
    writes = asked(target, "target", "which site each layer writes is not in its files", files)
    if config.get("normalization_method", "none") != "none":
        asked(normalised, "normalised", "it was trained on activations normalised by numbers not in its files", files)
    tying, n = str(config.get("decoder_tying", "none")), int(config["num_layers"])
    _understood(files, config, t)
    taken(files, file, [f"encoders.{i}.{part}" for i in range(n) for part in ("weight", "bias")], t)
    ins, outs = [f"{reads}.{i}" for i in range(n)], [f"{writes}.{i}" for i in range(n)]
    pairs = [(s, m) for s in range(n) for m in range(s, n)]
    taken(files, file, [f"decoders.{_name(s, m, tying)}.{p}" for s, m in pairs for p in ("weight", "bias")], t)
    decoder: list[dict[str, Tensor]] = [{} for _ in ins]
    b_dec = {w: torch.zeros(int(config["d_model"])) for w in outs}
    skip = {}
    for s, m in pairs:
        name = _name(s, m, tying)
        scale = t.get(f"feature_scale.{m}")
        weight = t[f"decoders.{name}.weight"].T
        decoder[s][outs[m]] = (weight if scale is None else weight * scale[:, None]).contiguous()
        if tying != "per_target" or s == m:  # one decoder for the sum of all sources has one bias
            b_dec[outs[m]] = b_dec[outs[m]] + t[f"decoders.{name}.bias"]
        key = f"skip_weights.{name if tying == 'none' else m}"
        if key in t and (tying == "none" or s == m):
            skip[ins[s], outs[m]] = t[key]
    biases = [t[f"encoders.{i}.bias"] for i in range(n)]
    return Dictionary(
        tuple(Block(len(b), (r,), tuple(w)) for b, r, w in zip(biases, ins, decoder, strict=True)),
        tuple({r: t[f"encoders.{i}.weight"]} for i, r in enumerate(ins)),
        tuple(decoder),
        tuple(biases),
        b_dec,
        tuple(JumpRelu(t["log_threshold"][i].exp()) if "log_threshold" in t else Relu() for i in range(n)),
        skip,
        about={"format": NAME, "model": config.get("model_name"), "config": config},
    )


def _name(source: int, target: int, tying: str) -> str:
    """Return the name of the decoder from one layer to another."""
    return {"per_source": str(source), "per_target": str(target)}.get(tying, f"{source}->{target}")


def _understood(files: Files, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    what, kind = f"dictionary at {str(files.path)!r}", config.get("activation_fn", "jumprelu")
    if kind not in ("relu", "jumprelu") or (kind == "jumprelu") != ("log_threshold" in tensors):
        raise Refused(what, f"its gate {kind!r} chooses among the latents of all layers", "convert it to jumprelu")
    if any(n.startswith(_OLD) for n in tensors):
        raise Refused(what, "its latents are scaled by an older rule, which is not known", "convert it")
    if any(n.startswith("feature_offset") and bool((v != 0).any()) for n, v in tensors.items()):
        raise Refused(
            what, "an active latent has another value at each layer that it writes", "train it without offset"
        )


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a cross-layer transcoder of layers 0 … n − 1 as a folder, folded, its decoders untied.

    Raises:
        Refused: the format cannot hold it.
    """
    d = jumping(subtracting(fold(dictionary), False))
    n, gate = len(d.blocks), d.gates[0]
    fits = len(d.writes) == n and all(
        len(b.reads) == 1
        and b.n_latents == d.blocks[0].n_latents
        and set(b.writes) == set(d.writes[i:])
        and parse(b.reads[0]).layer == i == parse(d.writes[i]).layer
        for i, b in enumerate(d.blocks)
    )
    places = {(d.reads[s], d.writes[m]): f"{s}->{m}" for s in range(n) for m in range(s, n)} if fits else {}
    if not fits or d.reading or d.writing or not set(d.skip) <= set(places):
        raise Refused(
            f"{d!r} as {NAME}", "the format holds cross-layer transcoders from layer 0 on", "write its blocks"
        )
    if not isinstance(gate, JumpRelu | Relu) or any(type(g) is not type(gate) for g in d.gates):
        raise unheld(d, NAME, gate)
    none = torch.zeros_like(d.b_dec[d.writes[0]])
    tensors = {}
    for i in range(n):
        tensors |= {
            f"encoder_module.encoders.{i}.weight": d.encoder[i][d.reads[i]],
            f"encoder_module.encoders.{i}.bias_param": d.b_enc[i],
        }
    for (read, write), name in places.items():
        s = d.reads.index(read)
        own = s == d.writes.index(write)
        tensors[f"decoder_module.decoders.{name}.weight"] = d.decoder[s][write].T
        tensors[f"decoder_module.decoders.{name}.bias_param"] = d.b_dec[write] if own else none
        if d.skip:
            missing = none.new_zeros(len(none), d.width(read))
            tensors[f"decoder_module.skip_weights.{name}"] = d.skip.get((read, write), missing)
    if isinstance(gate, JumpRelu):
        theta = torch.stack([g.threshold for g in d.gates if isinstance(g, JumpRelu)])
        if bool((theta < 0).any()):
            raise Refused(f"{d!r} as {NAME}", "the format has thresholds ≥ 0", "choose another format")
        tensors["theta_manager.log_threshold"] = theta.log()
    config = {
        "num_features": d.blocks[0].n_latents,
        "num_layers": n,
        "d_model": len(none),
        "model_name": d.about.get("model"),
        "activation_fn": "jumprelu" if isinstance(gate, JumpRelu) else "relu",
        "normalization_method": "none",
        "decoder_tying": "none",
        "skip_connection": bool(d.skip),
    }
    write_plain(Path(path) / WEIGHTS, tensors)
    write_config(Path(path) / CONFIG, config)
    return Path(path)
