"""circuit-tracer: a folder with `config.yaml` and one transcoder per layer, or one cross-layer transcoder.

A set has `layer_{i}.safetensors` with `W_enc` [latent, width], `W_dec` [latent, width] (in older files transposed),
`b_enc`, `b_dec`, optionally `activation_function.threshold`, `k`, and `W_skip` (y += x W_skipᵀ). A cross-layer
transcoder has `W_enc_{i}.safetensors` (`W_enc_i`, `b_enc_i`, `b_dec_i`, optionally `threshold_i` and `W_skip_i`, here
y += x W_skip) and `W_dec_{i}.safetensors` (`W_dec_i` [latent, layers from i on, width]). Gates pass negative values:
x where x > θ, and x on the k largest x. Position 0 is left out of graphs there, which the files do not record.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.core.address import parse
from cutaway.core.refuse import Refused
from cutaway.core.sites import BY_NAME
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import Files, asked, asked_all, taken, write_config, write_plain
from cutaway.dictionaries.formats.shared.simple import Simple, before_weight, unheld
from cutaway.dictionaries.gates import Gate, JumpRelu, Relu, TopK
from cutaway.dictionaries.parts import Block
from cutaway.dictionaries.transforms import fold, jumping, subtracting, together
from cutaway.models.anatomy.foreign_names import WRAPPED, hook_in_layer, hook_of_site, site_of_hook

NAME = "circuit_tracer"
CONFIG = "config.yaml"
_THRESHOLD = "activation_function.threshold"
_PLAIN = {"W_enc", "W_dec", "b_enc", "b_dec"}
NormWeights = dict[int, Tensor] | Literal["included"]


def detect(files: Files) -> bool:
    """True if a folder (or the file of one layer) holds dictionaries in this format."""
    shapes = files.shapes(next(iter(_layers(files).values()), None))
    single = set(shapes) >= _PLAIN and set(shapes) <= _PLAIN | {_THRESHOLD, "k", "W_skip"}
    crossing = next(iter(_crossing(files)), None)
    return single or (crossing is not None and f"W_enc_{crossing}" in files.shapes(f"W_enc_{crossing}.safetensors"))


def _layers(files: Files) -> dict[int, str]:
    names = files.matching("layer_*.safetensors")
    return dict(sorted((int(m[1]), f) for f in names if (m := re.fullmatch(r"layer_(\d+)\.safetensors", f))))


def _crossing(files: Files) -> list[int]:
    if files.path.is_file():
        return []
    names = files.matching("W_enc_*.safetensors")
    return sorted(int(m[1]) for f in names if (m := re.fullmatch(r"W_enc_(\d+)\.safetensors", f)))


def read(
    files: Files,
    *,
    site: str | None = None,
    target: str | None = None,
    activation: Literal["relu", "topk", "jumprelu"] | None = None,
    k: int | None = None,
    norm_weights: NormWeights | None = None,
) -> Dictionary:
    """Read the set, or the cross-layer transcoder; the file of one layer gives its transcoder alone.

    `site` and `target` name what every layer reads and writes (`mlp_in`, `mlp_out`) without a configuration;
    `activation` and `k` what it does not say. `norm_weights` are needed, by layer, where the norm before the MLP is
    read without its weight ("included": the captured activations are without it already).
    """
    config = files.yaml(CONFIG)
    reads, bare = _hook(config.get("feature_input_hook"), site)
    writes, _ = _hook(config.get("feature_output_hook"), target)
    kind, size = activation or config.get("activation"), k if k is not None else config.get("k")
    which = "which site each layer {} is not in a configuration (its name without a layer, such as {})"
    choices: dict[str, Any] = {
        "site": (reads, which.format("reads", "mlp_in")),
        "target": (writes, which.format("writes", "mlp_out")),
    }
    if kind == "topk" and not all("k" in files.shapes(f) for f in _layers(files).values()):
        choices["k"] = size, "its gate is top-k, and no file says of how many"
    reads, writes, *_ = asked_all(files, choices)
    about = {"format": NAME, "model": config.get("model_name"), "scan": config.get("scan")}
    crossing = _crossing(files)
    if crossing:
        made = _cross_layer(files, crossing, reads, writes, kind, about)
    else:
        layers = _layers(files).items()
        made = together([_single(files, f, f"{reads}.{i}", f"{writes}.{i}", kind, size, about) for i, f in layers])
    if not bare:
        return made
    weights = asked(norm_weights, "norm_weights", f"it reads {reads} before the norm's weight is multiplied in", files)
    if not isinstance(weights, str):
        for layer, weight in weights.items():
            made = before_weight(made, f"{reads}.{layer}", weight)
    return made


def _hook(name: str | None, given: str | None) -> tuple[str | None, bool]:
    if given is not None:
        bare = str(given).partition(".")[0]
        if bare not in BY_NAME or BY_NAME[bare].scope != "layer" or bare != given:
            why = "every layer has it, so its name stands without a layer"
            raise Refused(f"site {given!r}", why, f"give {bare if bare in BY_NAME else 'mlp_in or mlp_out'}")
        return given, False
    if not name:
        return None, False
    address, bare = site_of_hook(hook_in_layer(0, str(name)))
    return address.site, bare


def _single(
    files: Files, file: str, reads: str, writes: str, kind: str | None, k: int | None, about: dict[str, Any]
) -> Dictionary:
    tensors = files.tensors(file)
    encoder, decoder, b_enc, b_dec = taken(files, file, ["W_enc", "W_dec", "b_enc", "b_dec"], tensors)
    n, width = len(b_enc), len(b_dec)
    if tuple(decoder.shape) == (width, n) and n != width:
        decoder = decoder.T
    gate: Gate
    if kind == "topk":
        k = int(tensors["k"]) if "k" in tensors else k
        gate = TopK(int(asked(k, "k", "its gate is top-k, and no file says of how many", files)), signed=True)
    elif kind == "relu" or _THRESHOLD not in tensors:
        if kind is None and "k" in tensors:
            gate = TopK(int(tensors["k"]), signed=True)
        else:
            gate = Relu()
    else:
        gate = JumpRelu(tensors[_THRESHOLD].reshape(-1), signed=True)
    made = Simple(reads, writes, encoder, decoder, b_enc, b_dec, gate, tensors.get("W_skip"), about=about)
    return made.dictionary()


def _cross_layer(
    files: Files, layers: list[int], reads: str, writes: str, kind: str | None, about: dict[str, Any]
) -> Dictionary:
    n = len(layers)
    if layers != list(range(n)):
        raise Refused(f"folder {str(files.root)!r}", f"it has layers {layers}", "fetch all layers, from 0 on")
    encoder, decoder, b_enc, b_dec, gates, skip = [], [], [], {}, [], {}
    for i in layers:
        file = f"W_enc_{i}.safetensors"
        tensors = files.tensors(file)
        e, b, out = taken(files, file, [f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}"], tensors)
        (d,) = taken(files, f"W_dec_{i}.safetensors", [f"W_dec_{i}"], files.tensors(f"W_dec_{i}.safetensors"))
        if d.shape[1] != n - i:
            raise Refused(f"folder {str(files.root)!r}", f"layer {i} writes {d.shape[1]} layers", "fetch all layers")
        encoder.append({f"{reads}.{i}": e})
        decoder.append({f"{writes}.{i + m}": d[:, m].contiguous() for m in range(n - i)})
        b_enc.append(b)
        b_dec[f"{writes}.{i}"] = out
        jump = f"threshold_{i}" in tensors and kind != "relu"
        gates.append(JumpRelu(tensors[f"threshold_{i}"].reshape(-1), signed=True) if jump else Relu())
        if f"W_skip_{i}" in tensors:
            skip[f"{reads}.{i}", f"{writes}.{i}"] = tensors[f"W_skip_{i}"].T.contiguous()
    blocks = tuple(Block(len(b_enc[i]), tuple(encoder[i]), tuple(decoder[i])) for i in layers)
    d = Dictionary(blocks, tuple(encoder), tuple(decoder), tuple(b_enc), b_dec, tuple(gates), skip, about=about)
    return d.to(dtype=torch.promote_types(d.dtype, torch.float32))


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a per-layer set or a cross-layer transcoder of layers 0 … n − 1 as a folder, folded.

    Raises:
        Refused: the format cannot hold it.
    """
    d = jumping(subtracting(fold(dictionary), False))
    n, root = len(d.blocks), Path(path)
    reads, writes = parse(d.blocks[0].reads[0]).site, parse(d.blocks[0].writes[0]).site
    ins, outs = [f"{reads}.{i}" for i in range(n)], [f"{writes}.{i}" for i in range(n)]
    one = all(b.reads == (ins[i],) and b.writes == (outs[i],) for i, b in enumerate(d.blocks))
    cross = all(b.reads == (ins[i],) and set(b.writes) == set(outs[i:]) for i, b in enumerate(d.blocks))
    if not (one or cross) or d.reading or d.writing or any(e not in zip(ins, outs, strict=True) for e in d.skip):
        raise Refused(
            f"{d!r} as {NAME}",
            "the format holds one transcoder a layer from 0 on, or a cross-layer one",
            "write its blocks in another format",
        )
    for i in range(n):
        skip = d.skip.get((ins[i], outs[i]))
        if one:
            tensors = {
                "W_enc": d.encoder[i][ins[i]],
                "W_dec": d.decoder[i][outs[i]],
                "b_enc": d.b_enc[i],
                "b_dec": d.b_dec[outs[i]],
            } | _gate(d, i)
            write_plain(root / f"layer_{i}.safetensors", tensors if skip is None else {**tensors, "W_skip": skip})
            continue
        tensors = {f"W_enc_{i}": d.encoder[i][ins[i]], f"b_enc_{i}": d.b_enc[i], f"b_dec_{i}": d.b_dec[outs[i]]}
        held = _gate(d, i)
        if "k" in held:
            raise unheld(d, f"{NAME} cross-layer transcoder", d.gates[i])
        tensors |= {f"threshold_{i}": t for t in held.values()}
        tensors |= {} if skip is None else {f"W_skip_{i}": skip.T}
        write_plain(root / f"W_enc_{i}.safetensors", tensors)
        decoder = torch.stack([d.decoder[i][w] for w in outs[i:]], 1)
        write_plain(root / f"W_dec_{i}.safetensors", {f"W_dec_{i}": decoder})
    config: dict[str, Any] = {
        "model_name": d.about.get("model"),
        "model_kind": "transcoder_set" if one else "cross_layer_transcoder",
        "feature_input_hook": WRAPPED.get(reads) or hook_of_site(ins[0]).split(".", 2)[2],
        "feature_output_hook": hook_of_site(outs[0]).split(".", 2)[2],
        "scan": d.about.get("scan"),
    }
    gate = d.gates[0]
    if isinstance(gate, TopK):
        config |= {"activation": "topk", "k": gate.k}
    write_config(root / CONFIG, config)
    return root


def _gate(d: Dictionary, i: int) -> dict[str, Tensor]:
    gate = d.gates[i]
    if isinstance(gate, Relu):
        return {}
    if isinstance(gate, JumpRelu) and (gate.signed or bool((gate.threshold >= 0).all())):
        return {_THRESHOLD: gate.threshold}
    if isinstance(gate, TopK) and gate.signed:
        return {"k": torch.tensor(gate.k)}
    raise unheld(d, NAME, gate)
