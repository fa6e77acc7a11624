"""SAELens from version 6: `cfg.json` with `metadata`, and `sae_weights.safetensors`; also its training checkpoints.

`W_enc` is [width, latent] and `W_dec` [latent, width]. A training checkpoint may have a scale that is not folded in yet
(`activation_scaler.json`) and one `topk_threshold` for all latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.core.address import Address, parse
from cutaway.core.refuse import Keyword, Refused
from cutaway.dictionaries.about import trained_bos
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import Files, asked, held, taken, write_config, write_plain
from cutaway.dictionaries.formats.shared.simple import Simple, before_weight, simple, unheld
from cutaway.dictionaries.gates import (
    AbsTopK,
    BatchTopK,
    Gate,
    Gated,
    JumpRelu,
    MatchingPursuit,
    Relu,
    TopK,
)
from cutaway.dictionaries.norms import Norm, Scale, TokenLayerNorm, TokenMean, TokenNorm, Whitening
from cutaway.dictionaries.transforms import jumping
from cutaway.models.anatomy.foreign_names import FLATTENED_HEADS, hook_of_site, site_of_hook

NAME = "saelens"
CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"
_SIMPLE = {Relu: "standard", JumpRelu: "jumprelu", TopK: "topk", AbsTopK: "abstopk",
           Gated: "gated", MatchingPursuit: "matching_pursuit"}  # fmt: skip


def detect(files: Files) -> bool:
    """True if a folder holds a dictionary in this format."""
    return files.has(WEIGHTS) and "metadata" in files.json(CONFIG) and "W_dec" in files.shapes(WEIGHTS)


def read(
    files: Files,
    *,
    site: str | None = None,
    target: str | None = None,
    norm_weight: Tensor | Literal["included"] | None = None,
    norm_bias: Tensor | None = None,
    centered: bool | None = None,
) -> Dictionary:
    """Read the dictionary; `site` and `target` stand in for what the file says it reads and writes.

    Where it reads a norm's output before the norm's weight, `norm_weight` (and `norm_bias`) tells it, or "included"
    says that the activations it is given will be those before the weight. `centered` says, where the configuration
    asks for centred writing weights, whether its model has LayerNorm and so got them: each token's mean over the width
    is then taken away before it is encoded, and given back.
    """
    config = files.json(CONFIG)
    known = {**config, **config["metadata"]}
    return assembled(files, known, files.tensors(WEIGHTS), NAME, site, target, norm_weight, norm_bias, centered)


def assembled(
    files: Files,
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    name: str,
    site: str | None,
    target: str | None,
    norm_weight: Tensor | Literal["included"] | None,
    norm_bias: Tensor | None,
    centered: bool | None,
) -> Dictionary:
    """Return the dictionary of a configuration and its tensors, whatever the version."""
    kind = str(config.get("architecture", "standard"))
    coder = kind.endswith("transcoder")
    reads, bare = _site(config, "hook_name", "hook_head_index", site)
    writes = _site(config, "hook_name_out", "hook_head_index_out", target)[0] if coder else reads
    reads = asked(reads, "site", "which site it reads is not in the file", files)
    writes = asked(writes, "target", "which site it writes is not in the file", files)
    gate, greedy = gate_of(kind, config, tensors, str(files.root / WEIGHTS)), kind == "matching_pursuit"
    subtract = bool(config.get("apply_b_dec_to_input", True)) and not coder
    decoder, b_dec = taken(files, WEIGHTS, ["W_dec", "b_dec"], tensors)
    reading = _centred(_norm(files, config), reads, writes, config, centered, files)
    if reading is not None and "W_skip" in tensors:
        why = "what it reads is normalised, and its skip adds what is not"
        raise Refused(f"dictionary at {str(files.path)!r}", why, "only skips without normalisation are known here")
    made = Simple(
        reads,
        writes,
        None if greedy else taken(files, WEIGHTS, ["W_enc"], tensors)[0].T,
        decoder,
        tensors.get("b_enc"),
        torch.zeros_like(b_dec) if greedy and not subtract else b_dec,
        gate,
        tensors.get("W_skip"),
        subtract,
        bool(config.get("rescale_acts_by_decoder_norm", False)),
        reading,
        None if coder and reading is not None and reading.per_token else reading,
        {
            "format": name,
            "model": config.get("model_name"),
            "architecture": kind,
            "prepend_bos": config.get("prepend_bos"),
        },
    ).dictionary()
    if not bare or site is not None:
        return made
    weight = asked(norm_weight, "norm_weight", f"it reads {reads} before the norm's weight is multiplied in", files)
    return made if isinstance(weight, str) else before_weight(made, reads, weight, norm_bias)


def _site(config: Mapping[str, Any], key: str, head_key: str, given: str | None) -> tuple[str | None, bool]:
    if given is not None or not config.get(key):
        return given, False
    address, bare = site_of_hook(str(config[key]))
    head = config.get(head_key)
    return str(Address(address.site, address.layer, head)), bare


def gate_of(kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Gate:
    """Return the gate of an architecture, with the numbers of its configuration and the tensors of its file (`where`).

    Raises:
        Refused: no such architecture, or a tensor is missing.
    """
    base = kind.removesuffix("_transcoder").removesuffix("_skip")
    if base in ("standard", "transcoder", "skip"):
        return Relu()
    if base in ("topk", "abstopk"):
        return TopK(int(config["k"])) if base == "topk" else AbsTopK(int(config["k"]))
    if base == "gated":
        return Gated(*held(where, ["r_mag", "b_gate", "b_mag"], tensors))
    if base == "matching_pursuit":
        steps = config.get("max_iterations") or tensors["W_dec"].shape[1]
        stop = bool(config.get("stop_on_duplicate_support", True))
        return MatchingPursuit(float(config.get("residual_threshold", 1e-2)), int(steps), stop)
    if base in ("jumprelu", "batchtopk", "matryoshka_batchtopk"):
        if "threshold" in tensors:
            return JumpRelu(tensors["threshold"])
        if "log_threshold" in tensors:
            return JumpRelu(tensors["log_threshold"].exp())
        if "topk_threshold" in tensors:
            return BatchTopK(max(1, round(float(config.get("k", 1)))), float(tensors["topk_threshold"]))
        held(where, ["threshold"], tensors)
    raise Refused(f"dictionary in {where!r}", f"its architecture {kind!r} is not known", "convert it")


def _norm(files: Files, config: Mapping[str, Any]) -> Norm | None:
    how = config.get("normalize_activations") or "none"
    if how == "constant_norm_rescale":
        return TokenNorm()
    if how == "layer_norm":
        return TokenLayerNorm(1e-5)
    factor = files.json(SCALER).get("scaling_factor")
    if files.has(WHITENING) and files.json(SCALER).get("has_whitening", True):
        if factor is not None:
            raise Refused(f"file {SCALER!r}", "activations are scaled and whitened", "fold one of them before")
        return Whitening(*taken(files, WHITENING, ["mean", "matrix", "inverse_matrix"], files.tensors(WHITENING)))
    if factor is not None:
        return Scale(float(factor))
    if how in ("none", "expected_average_only_in", "covariance_whitening"):
        return None  # folded into the weights already
    raise Refused(f"dictionary at {str(files.path)!r}", f"normalisation {how!r} is not known", "convert it")


_STREAM = ("embed", "pos_embed", "resid_pre", "resid_mid", "resid_post", "head_out", "attn_out", "mlp_out")


def _centred(
    norm: Norm | None, reads: str, writes: str, config: Mapping[str, Any], centered: bool | None, files: Files
) -> Norm | None:
    """Return the normalisation with the centring of the model that the dictionary was trained on.

    Centred writing weights take the mean over the width out of all that is added to the residual stream, and leave
    every other activation as it is. TransformerLens centres models with LayerNorm only, and which those are is not in
    the files.
    """
    options = {**config, **(config.get("model_from_pretrained_kwargs") or {})}
    stream = [s for s in dict.fromkeys((reads, writes)) if parse(s).site in _STREAM]
    if not options.get("center_writing_weights") or not stream:
        return norm
    question = (
        f"{stream[0]} was read with center_writing_weights, which takes each token's mean over the width away if the "
        "model has LayerNorm (true), and does nothing if it has RMSNorm (false)"
    )
    if not asked(centered, "centered", question, files):
        return norm
    if reads != writes or norm is not None:
        why = "it writes what is centred, or normalises it as well, and only autoencoders without are known here"
        raise Refused(
            f"dictionary at {str(files.path)!r}",
            why,
            ("say ", Keyword("centered", False), " and centre what you give it"),
        )
    return TokenMean()


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a dictionary as a folder in this format, folded.

    Raises:
        Refused: the format cannot hold it.
    """
    config, tensors = described(dictionary)
    write_plain(Path(path) / WEIGHTS, tensors)
    write_config(Path(path) / CONFIG, config)
    return Path(path)


def described(dictionary: Dictionary) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and tensors of a dictionary."""
    s = simple(jumping(dictionary), NAME, skip=True, norms=True)
    coder, gate, address = s.site != s.target, s.gate, parse(s.site)
    kind = _kind(dictionary, s, coder)
    tensors = {"W_enc": s.encoder.T} if s.encoder is not None else {}
    tensors |= {"W_dec": s.decoder, "b_dec": s.b_dec}
    config: dict[str, Any] = {
        "architecture": kind,
        "d_in": dictionary.width(s.site),
        "d_sae": len(s.decoder),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": s.subtract,
        "normalize_activations": _how(dictionary, s, coder),
        "reshape_activations": FLATTENED_HEADS if address.site == "z" and address.unit is None else "none",
    }
    if isinstance(gate, Gated):
        tensors |= {"r_mag": gate.r_mag, "b_gate": gate.b_gate, "b_mag": gate.b_mag}
    elif isinstance(gate, MatchingPursuit):
        config |= {
            "residual_threshold": gate.residual,
            "max_iterations": gate.steps,
            "stop_on_duplicate_support": gate.stop_on_repeat,
        }
        if not s.subtract and bool((s.b_dec != 0).any()):
            raise Refused(f"{dictionary!r} as {NAME}", "the format adds only the bias that it subtracts", "retrain it")
    else:
        tensors["b_enc"] = s.b_enc if s.b_enc is not None else torch.zeros(len(s.decoder))
    if isinstance(gate, JumpRelu):
        tensors["threshold"] = gate.threshold
    elif isinstance(gate, TopK | AbsTopK):
        config |= {"k": gate.k, "rescale_acts_by_decoder_norm": False}
    metadata: dict[str, Any] = {
        "model_name": s.about.get("model"),
        "hook_name": hook_of_site(s.site),
        "hook_head_index": address.unit,
        "sae_lens_version": "6.0.0",
    }
    if isinstance(s.reading, TokenMean):
        metadata["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    if (bos := trained_bos(s.about)) is not None:
        metadata["prepend_bos"] = bos in ("both", "context")
    if coder:
        config["d_out"] = s.decoder.shape[1]
        metadata |= {"hook_name_out": hook_of_site(s.target), "hook_head_index_out": parse(s.target).unit}
    if s.skip is not None:
        tensors["W_skip"] = s.skip
    return {**config, "metadata": metadata}, tensors


def _kind(d: Dictionary, s: Simple, coder: bool) -> str:
    gate = s.gate
    if type(gate) not in _SIMPLE:
        raise unheld(d, NAME, gate)
    kind = _SIMPLE[type(gate)]
    if not coder:
        if s.skip is not None:
            raise Refused(f"{d!r} as {NAME}", "only transcoders have a skip there", "choose another format")
        return kind
    if kind not in ("standard", "jumprelu"):
        raise unheld(d, f"{NAME} transcoder", gate)
    return ("" if kind == "standard" else "jumprelu_") + ("" if s.skip is None else "skip_") + "transcoder"


def _how(d: Dictionary, s: Simple, coder: bool) -> str:
    if s.reading is None and s.writing is None:
        return "none"
    paired = s.writing is None and s.skip is None if coder else type(s.writing) is type(s.reading)
    if paired and isinstance(s.reading, TokenMean) and not coder:
        return "none"
    if paired and isinstance(s.reading, TokenNorm):
        return "constant_norm_rescale"
    if paired and isinstance(s.reading, TokenLayerNorm) and s.reading.eps == 1e-5:
        return "layer_norm"
    raise Refused(f"{d!r} as {NAME}", "the format has no such normalisation", "choose another format")
