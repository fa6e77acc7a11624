"""Llama Scope (2024): `hyperparams.json` and `checkpoints/final.safetensors`.

`encoder.weight` [latent, width], `encoder.bias`, `decoder.weight` [width, latent], `decoder.bias`. Activations are
scaled by s = √width / norm_in, the output divided by √width / norm_out. One scalar θ gates all latents, and the files
do not say in which space: the code of its time compares it with the pre-activation of scaled activations ("scaled");
another reader, changed by one of the authors after an "abnormally large L0", compares θ · s with it ("raw"). The two
differ, so the choice must be made; `l0_check` tells which of them gives the declared L0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import Files, asked, taken, write_config, write_plain
from cutaway.dictionaries.formats.shared.simple import Simple, simple, unheld
from cutaway.dictionaries.gates import JumpRelu, Relu, TopK
from cutaway.dictionaries.norms import Scale
from cutaway.dictionaries.transforms import jumping
from cutaway.models.anatomy.foreign_names import SITE_IN, SITE_OUT, hook_of_site, site_of_hook

NAME = "llama_scope"
CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_KEYS = ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"]


def detect(files: Files) -> bool:
    """True if a folder holds a dictionary in this format."""
    return "dataset_average_activation_norm" in files.json(CONFIG) and set(files.shapes(WEIGHTS)) >= set(_KEYS[:3])


def read(
    files: Files,
    *,
    site: str | None = None,
    target: str | None = None,
    threshold_space: Literal["scaled", "raw"] | None = None,
) -> Dictionary:
    """Read the dictionary, its scales kept (`fold` moves them into the weights).

    `threshold_space` says what θ is compared with; it is asked for where the gate has a θ above 0.
    """
    config, tensors = files.json(CONFIG), files.tensors(WEIGHTS)
    encoder, b_enc, decoder = taken(files, WEIGHTS, _KEYS[:3], tensors)
    reads = site or str(site_of_hook(str(config[SITE_IN]))[0])
    writes = target or str(site_of_hook(str(config.get(SITE_OUT, config[SITE_IN])))[0])
    how = config.get("norm_activation", "dataset-wise")
    if how not in ("dataset-wise", "inference"):
        raise Refused(f"dictionary at {str(files.path)!r}", f"normalisation {how!r} is not known", "convert it")
    norms, width = config["dataset_average_activation_norm"], encoder.shape[1]
    reading = Scale(width**0.5 / float(norms["in"])) if how == "dataset-wise" else None
    writing = Scale(len(decoder) ** 0.5 / float(norms["out"])) if how == "dataset-wise" else None
    kind, theta = config.get("act_fn", "jumprelu"), float(config.get("jump_relu_threshold") or 0.0)
    if kind == "jumprelu":
        if theta != 0.0 and reading is not None:
            question = "its θ may be meant for scaled or for raw pre-activations"
            space = asked(threshold_space, "threshold_space", question, files)
            theta = theta if space == "scaled" else theta * reading.factor
        gate = JumpRelu(torch.full_like(b_enc, theta))
    elif kind in ("relu", "topk"):
        gate = Relu() if kind == "relu" else TopK(int(config["top_k"]))
    else:
        raise Refused(f"dictionary at {str(files.path)!r}", f"its gate {kind!r} is not known", "convert it")
    return Simple(
        reads,
        writes,
        encoder,
        decoder.T,
        b_enc,
        tensors.get("decoder.bias", torch.zeros(len(decoder))),
        gate,
        subtract=bool(config.get("apply_decoder_bias_to_pre_encoder", False)) and reads == writes,
        norm_aware=bool(config.get("sparsity_include_decoder_norm", False)),
        reading=reading,
        writing=writing,
        about={"format": NAME, "declared_l0": config.get("top_k")},
    ).dictionary()


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a dictionary with one threshold for all latents as a folder; scales are folded, θ is then unambiguous.

    Raises:
        Refused: the format cannot hold it.
    """
    s = simple(jumping(dictionary), NAME)
    if s.encoder is None or s.b_enc is None or not isinstance(s.gate, JumpRelu | Relu | TopK):
        raise unheld(dictionary, NAME, s.gate)
    config = {
        "d_model": s.encoder.shape[1],
        "d_sae": len(s.decoder),
        "norm_activation": "inference",
        "act_fn": {JumpRelu: "jumprelu", Relu: "relu", TopK: "topk"}[type(s.gate)],
        "dataset_average_activation_norm": {"in": 1.0, "out": 1.0},
        SITE_IN: hook_of_site(s.site),
        SITE_OUT: hook_of_site(s.target),
        "sparsity_include_decoder_norm": False,
        "apply_decoder_bias_to_pre_encoder": s.subtract,
    }
    if isinstance(s.gate, JumpRelu):
        if bool((s.gate.threshold != s.gate.threshold[0]).any()) or (s.gate.signed and s.gate.threshold[0] < 0):
            raise Refused(f"{dictionary!r} as {NAME}", "the format has one θ ≥ 0 for all latents", "choose another")
        config["jump_relu_threshold"] = float(s.gate.threshold[0])
    elif isinstance(s.gate, TopK):
        config["top_k"] = s.gate.k
    parts = (s.encoder, s.b_enc, s.decoder.T, s.b_dec)
    write_plain(Path(path) / WEIGHTS, dict(zip(_KEYS, parts, strict=True)))
    write_config(Path(path) / CONFIG, config)
    return Path(path)
