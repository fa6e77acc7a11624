"""Crosscoders of dictionary_learning's fork for model diffing (jkminder): `ae.pt` or `model.safetensors`.

    encoder.weight [layer, width, latent], encoder.bias [latent], decoder.weight [layer, latent, width],
    decoder.bias [layer, width], code_normalization_id; with batch top-k also k and threshold (−1: none yet)

π is the sum over layers, f = max(π, 0); with batch top-k those f stay whose f · n is above the threshold. n comes from
the norms of a latent's decoder rows, by the id: their sum over layers (1 crosscoder), the norm of all together (2 sae),
a weighted sum of both (3 mixed), one (4 none), or each layer's own, with a threshold of its own (5 decoupled), so that
there is one block a layer. Here such latents have the unit f · n, which that tool calls their activations. A normaliser
(`activation_mean`, `activation_global_scale`) is folded in. Which sites the layers are is not in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cutaway.core.pt import write_pt
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import PT, Files, asked, taken, write_config
from cutaway.dictionaries.formats.shared.simple import unheld
from cutaway.dictionaries.gates import BatchTopK, Gate, JumpRelu, Relu
from cutaway.dictionaries.parts import Block
from cutaway.dictionaries.transforms import fold, subtracting

NAME = "dictionary_learning_crosscoder"
CONFIG = "config.json"
CodeNorm = Literal["crosscoder", "sae", "mixed", "none", "decoupled"]  # the ids from 1 on
_KEYS = ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"]
_COMPILED = "_orig_mod."  # before every name, if it was saved while compiled
_ALMOST = 1e-8  # the tool divides by its scale and this


def detect(files: Files) -> bool:
    """True if a folder or file holds a dictionary in this format."""
    shapes = {n.removeprefix(_COMPILED): s for n, s in files.shapes(_file(files)).items()}
    return set(shapes) >= set(_KEYS) and len(shapes["encoder.weight"]) == len(shapes["decoder.weight"]) == 3


def _file(files: Files) -> str | None:
    if files.path.is_dir() and files.has("ae.pt"):
        return "ae.pt"
    return files.only(*(f"*{end}" for end in PT)) or files.only("*.safetensors")


def read(
    files: Files,
    *,
    sites: str | Sequence[str] | None = None,
    code_normalization: CodeNorm | None = None,
    mix: Sequence[float] | None = None,
) -> Dictionary:
    """Read the crosscoder; `sites` names what its layers are, in order (a list, or one text with commas).

    `code_normalization` is asked for where an older file has none, and for "mixed" `mix`, the weights of "sae" and
    "crosscoder", where no configuration tells them.
    """
    file, config = str(_file(files)), files.json(CONFIG)
    held = {n.removeprefix(_COMPILED): t.float() for n, t in files.tensors(file).items()}
    encoder, b_enc, decoder, b_dec = taken(files, file, _KEYS, held)
    if len(encoder) != len(decoder):
        why = f"it reads {len(encoder)} layers and writes {len(decoder)}"
        raise Refused(f"dictionary at {str(files.path)!r}", why, "only those that write what they read are known here")
    trainer = config.get("trainer", config)
    names = _sites(files, sites if sites is not None else trainer.get("sites"), len(encoder))
    kind: CodeNorm | None = code_normalization or _named(held)
    # of each block: the unit of its latents, its gate, what it writes
    parts: list[tuple[Tensor, Gate, tuple[str, ...]]] = [(torch.ones_like(b_enc), Relu(), names)]
    if "k" in held:
        kind = asked(kind, "code_normalization", "no id in the file tells by what norms it gates", files)
        norms, k = decoder.norm(dim=2), max(1, int(held["k"]))
        gates = [BatchTopK(k, t if t >= 0 else None) for t in held["threshold"].reshape(-1).tolist()]
        if kind == "decoupled":
            gates = gates * len(norms) if len(gates) == 1 else gates
            parts = [(n, g, (s,)) for n, g, s in zip(norms, gates, names, strict=True)]
        else:
            parts = [(_unit(files, kind, norms, trainer, mix), gates[0], names)]
    mean, into, back = _normaliser(files, held, kind, b_dec)
    b_enc = b_enc - torch.einsum("ld,ldf->f", mean * into, encoder)
    inside = {s: encoder[i].T * into for i, s in enumerate(names)}
    outside = {s: decoder[i] / back for i, s in enumerate(names)}
    inverse = [u.reciprocal().nan_to_num(posinf=0.0) for u, _, _ in parts]
    return Dictionary(
        tuple(Block(len(b_enc), names, writes) for _, _, writes in parts),
        tuple({s: w * u[:, None] for s, w in inside.items()} for u, _, _ in parts),
        tuple({s: outside[s] * v[:, None] for s in writes} for v, (_, _, writes) in zip(inverse, parts, strict=True)),
        tuple(b_enc * u for u, _, _ in parts),
        {s: b_dec[i] / back + mean[i] for i, s in enumerate(names)},
        tuple(g for _, g, _ in parts),
        about={"format": NAME, "model": trainer.get("lm_name"), "config": trainer},
    )


def _sites(files: Files, given: str | Sequence[str] | None, n: int) -> tuple[str, ...]:
    found = asked(given, "sites", f"which sites its {n} layers are is not in the file", files)
    names = tuple(s.strip() for s in (found.split(",") if isinstance(found, str) else found))
    if len(set(names)) != n:
        raise Refused(f"sites={','.join(names)}", f"the crosscoder has {n} layers", "name each of them, once")
    return names


def _named(held: dict[str, Tensor]) -> CodeNorm | None:
    number = int(held["code_normalization_id"]) if "code_normalization_id" in held else 0
    return get_args(CodeNorm)[number - 1] if 1 <= number <= len(get_args(CodeNorm)) else None


def _unit(files: Files, kind: str, norms: Tensor, trainer: dict[str, Any], mix: Sequence[float] | None) -> Tensor:
    """n of each latent, from the norms [layer, latent] of its decoder rows."""
    if kind == "none":
        return torch.ones_like(norms[0])
    summed, joint = norms.sum(0), norms.square().sum(0).sqrt()
    if kind != "mixed":
        return summed if kind == "crosscoder" else joint
    told = [trainer[n] for n in ("code_normalization_alpha_sae", "code_normalization_alpha_cc") if n in trainer]
    weights = mix if mix is not None else told or None
    weights = asked(weights, "mix", "the weights of its mixed norms are not in a configuration", files)
    if len(weights) != 2:
        raise Refused(f"mix={weights}", "there are two weights", "give that of the joint norm and that of the sum")
    return float(weights[0]) * joint + float(weights[1]) * summed


def _normaliser(files: Files, held: dict[str, Tensor], kind: str | None, like: Tensor) -> tuple[Tensor, float, float]:
    """Return the mean [layer, width] of what it reads, the factor on the way in, the divisor on the way back."""
    none = like.new_tensor(torch.nan)  # the tool's word for a missing normaliser
    mean, std = held.get("activation_mean", none), held.get("activation_std", none)
    if bool(mean.isnan().any() or std.isnan().any()):
        return torch.zeros_like(like), 1.0, 1.0
    if kind == "decoupled":
        why = "its code normalises activations twice where layers are decoupled"
        raise Refused(f"dictionary at {str(files.path)!r}", why, "train it without a normaliser")
    factor = float(held["activation_global_scale"])
    return mean.expand_as(like), factor, factor + _ALMOST


def write(dictionary: Dictionary, path: str | Path, k: int | None = None) -> Path:
    """Write a crosscoder of one block as a folder, folded; its latents gate in their own unit ("none").

    `k` is how many latents are active a token, which a JumpReLU does not say; only further training reads it.

    Raises:
        Refused: the format cannot hold it.
    """
    d = subtracting(fold(dictionary), False)
    block, gate = d.blocks[0], d.gates[0]
    sites = block.writes
    fits = len(d.blocks) == 1 and set(block.reads) == set(sites) and len({d.width(s) for s in sites}) == 1
    if not fits or d.skip or d.reading or d.writing:
        why = "the format holds one block that writes the sites that it reads, all of one width, without a skip"
        raise Refused(f"{d!r} as {NAME}", why, "choose another format")
    unit = torch.ones_like(d.b_enc[0])
    if isinstance(gate, JumpRelu) and bool((gate.threshold > 0).all()):
        if k is None:
            raise Refused(f"{d!r} as {NAME}", "the format says how many latents are active a token", "say it: k=…")
        unit, gate = gate.threshold.reciprocal(), BatchTopK(k, 1.0)
    if not isinstance(gate, Relu | BatchTopK) or not d.encoder[0]:
        raise unheld(d, NAME, gate)
    content: dict[str, Any] = {
        "encoder.weight": torch.stack([(d.encoder[0][s] * unit[:, None]).T for s in sites]).contiguous(),
        "encoder.bias": d.b_enc[0] * unit,
        "decoder.weight": torch.stack([d.decoder[0][s] / unit[:, None] for s in sites]),
        "decoder.bias": torch.stack([d.b_dec[s] for s in sites]),
        "code_normalization_id": torch.tensor(1 + get_args(CodeNorm).index("none")),
    }
    trainer = {
        "dict_class": "CrossCoder",
        "activation_dim": d.width(sites[0]),
        "dict_size": block.n_latents,
        "num_layers": len(sites),
        "sites": list(sites),
        "lm_name": d.about.get("model"),
        "code_normalization": "NONE",
    }
    if isinstance(gate, BatchTopK):
        none, theta = torch.full_like(content["decoder.bias"], torch.nan), gate.threshold
        content |= {
            "k": torch.tensor(gate.k, dtype=torch.int32),
            "activation_mean": none,
            "activation_std": none.clone(),
            "threshold": torch.tensor(-1.0 if theta is None else theta),
            "target_rms": torch.tensor(1.0),
            "activation_global_scale": torch.tensor(1.0),
        }
        trainer |= {"dict_class": "BatchTopKCrossCoder", "k": gate.k}
    write_pt(Path(path) / "ae.pt", content)
    write_config(Path(path) / CONFIG, {"trainer": trainer, "buffer": {}})
    return Path(path)
