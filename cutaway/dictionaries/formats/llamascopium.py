"""llamascopium (lm-saes from 2025 on): `config.json` with `sae_type`, and `sae_weights.safetensors`.

    sae, transcoder   W_E [width, latent], b_E, W_D [latent, width], b_D
    clt               W_E [layer, width, latent], b_E [layer, latent], W_D.m [m + 1, latent, width] by target, b_D.m
    crosscoder        W_E [site, width, latent], b_E [site, latent], to be summed, W_D [site, latent, width], b_D

`activation_function.log_jumprelu_threshold` holds log θ, `dataset_average_activation_norm.SITE` the mean norms by which
activations are scaled to √width. With `sparsity_include_decoder_norm` (the default) gating is norm-aware; in a
crosscoder each site gates for itself, by the norm of its own decoder, so it becomes one block a site, unless the gate
is a ReLU, for which norms do not matter. Older files (the R1 dictionaries) have `encoder.weight` [latent, width],
`decoder.weight` [width, latent] and `log_jumprelu_threshold`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import Files, asked, taken, write_config, write_plain
from cutaway.dictionaries.formats.shared.simple import Simple, simple, unheld
from cutaway.dictionaries.gates import BatchTopK, Gate, JumpRelu, Relu, TopK
from cutaway.dictionaries.gates.shared.gate import numbers_of, tensors_of
from cutaway.dictionaries.norms import Norm, Scale, TokenNorm
from cutaway.dictionaries.parts import Block
from cutaway.dictionaries.transforms import fold, jumping, subtracting
from cutaway.models.anatomy.foreign_names import (
    SITE_IN,
    SITE_OUT,
    SITES_BOTH,
    SITES_IN,
    SITES_OUT,
    hook_of_site,
    site_of_hook,
)

NAME = "llamascopium"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
_LOG, _OLD_LOG, _NORM = (
    "activation_function.log_jumprelu_threshold",
    "log_jumprelu_threshold",
    "dataset_average_activation_norm",
)
_OLD = {"encoder.weight", "encoder.bias", "decoder.weight"}
Norms = Mapping[str, float] | Literal["folded"]


def detect(files: Files) -> bool:
    """True if a folder holds a dictionary in this format."""
    shapes, config = files.shapes(WEIGHTS), files.json(CONFIG)
    new = {"W_E", "b_E"} <= set(shapes) and ("W_D" in shapes or "W_D.0" in shapes)
    return "d_model" in config and (new or set(shapes) >= _OLD)


def read(
    files: Files, *, site: str | None = None, target: str | None = None, average_norms: Norms | None = None
) -> Dictionary:
    """Read the dictionary, its scales kept (`fold` moves them into the weights).

    `average_norms` (by site, or "folded") are asked for where activations are to be scaled and no file says by what.
    """
    config, tensors = files.json(CONFIG), files.tensors(WEIGHTS)
    if config.get("use_glu_encoder"):
        raise Refused(f"dictionary at {str(files.path)!r}", "its encoder is gated by a second one", "retrain it")
    if "W_D.0" in tensors:
        return _cross_layer(files, config, tensors, average_norms)
    if tensors.get("W_E", torch.zeros(0)).ndim == 3:
        return _crosscoder(files, config, tensors, average_norms)
    hooks = (str(config[SITE_IN]), str(config.get(SITE_OUT, config[SITE_IN])))
    reads, writes = site or _site(hooks[0]), target or (_site(hooks[1]) if site is None else site)
    if "W_E" in tensors:
        encoder, b_enc, decoder = taken(files, WEIGHTS, ["W_E", "b_E", "W_D"], tensors)
        encoder, b_dec = encoder.T, tensors.get("b_D")
    else:
        encoder, b_enc, decoder = taken(files, WEIGHTS, ["encoder.weight", "encoder.bias", "decoder.weight"], tensors)
        decoder, b_dec = decoder.T, tensors.get("decoder.bias")
    norms = [_norm(files, config, tensors, hook, average_norms) for hook in hooks]
    if isinstance(norms[1], TokenNorm) and reads != writes:
        raise Refused(
            f"dictionary at {str(files.path)!r}", "each token's output is scaled by its own norm", "retrain it"
        )
    return Simple(
        reads,
        writes,
        encoder,
        decoder,
        b_enc,
        decoder.new_zeros(decoder.shape[1]) if b_dec is None else b_dec,
        _gate(config, tensors, len(b_enc)),
        norm_aware=_aware(config),
        reading=norms[0],
        writing=norms[1],
        subtract=bool(config.get("apply_decoder_bias_to_pre_encoder", False)) and reads == writes,
        about={"format": NAME},
    ).dictionary()


def _site(hook: str) -> str:
    return str(site_of_hook(hook)[0])


def _aware(config: Mapping[str, Any]) -> bool:
    return bool(config.get("sparsity_include_decoder_norm", True))


def _gate(config: Mapping[str, Any], tensors: Mapping[str, Tensor], n: int, layer: int | None = None) -> Gate:
    kind, k = str(config.get("act_fn", "relu")).lower(), int(config.get("top_k", 50))
    if kind == "jumprelu":
        log = tensors[_LOG] if _LOG in tensors else tensors[_OLD_LOG]
        theta = (log if layer is None or log.ndim == 1 else log[layer]).float().exp()
        return JumpRelu(theta.expand(n).clone())
    if kind in ("relu", "topk", "batchtopk"):
        return {"relu": Relu, "topk": lambda: TopK(k), "batchtopk": lambda: BatchTopK(k)}[kind]()
    raise Refused(f"gate {kind!r}", "it chooses among the latents of all layers together", "convert it to jumprelu")


def _norm(
    files: Files, config: Mapping[str, Any], tensors: Mapping[str, Tensor], hook: str, given: Norms | None
) -> Norm | None:
    how = config.get("norm_activation", "dataset-wise")
    if how == "inference" or given == "folded":
        return None
    if how == "token-wise":
        return TokenNorm()
    if how != "dataset-wise":
        raise Refused(f"dictionary at {str(files.path)!r}", f"normalisation {how!r} depends on the batch", "fold it")
    held = {**(config.get(_NORM) or {}), **{n: float(t) for n, t in tensors.items() if t.ndim == 0}}
    found = held.get(hook, held.get(f"{_NORM}.{hook}"))
    if found is None and given is not None and not isinstance(given, str):
        found = given.get(_site(hook))
    question = f"activations are scaled by their average norm, and no file tells it for {_site(hook)}"
    return Scale(int(config["d_model"]) ** 0.5 / float(asked(found, "average_norms", question, files)))


def _cross_layer(files: Files, config: dict[str, Any], tensors: dict[str, Tensor], given: Norms | None) -> Dictionary:
    ins, outs = ([str(h) for h in config[key]] for key in (SITES_IN, SITES_OUT))
    reads, writes, n = [_site(h) for h in ins], [_site(h) for h in outs], len(ins)
    encoder, b_enc = taken(files, WEIGHTS, ["W_E", "b_E"], tensors)
    taken(files, WEIGHTS, [f"{w}.{m}" for m in range(n) for w in ("W_D", "b_D")], tensors)
    blocks = tuple(Block(b_enc.shape[1], (reads[i],), tuple(writes[i:])) for i in range(n))
    scales = {s: _norm(files, config, tensors, h, given) for s, h in zip([*reads, *writes], [*ins, *outs], strict=True)}
    return _made(
        blocks,
        [{reads[i]: encoder[i].T.contiguous()} for i in range(n)],
        [{writes[m]: tensors[f"W_D.{m}"][i].contiguous() for m in range(i, n)} for i in range(n)],
        list(b_enc),
        {writes[m]: tensors[f"b_D.{m}"] for m in range(n)},
        [_gate(config, tensors, b_enc.shape[1], i) for i in range(n)],
        scales,
        config,
    )


def _crosscoder(files: Files, config: dict[str, Any], tensors: dict[str, Tensor], given: Norms | None) -> Dictionary:
    hooks = [str(h) for h in config[SITES_BOTH]]
    sites = [_site(h) for h in hooks]
    encoder, b_enc, decoder, b_dec = taken(files, WEIGHTS, ["W_E", "b_E", "W_D", "b_D"], tensors)
    shared, bias, n = {s: e.T.contiguous() for s, e in zip(sites, encoder, strict=True)}, b_enc.sum(0), b_enc.shape[1]
    scales = {s: _norm(files, config, tensors, h, given) for s, h in zip(sites, hooks, strict=True)}
    gate = _gate(config, tensors, n)
    if isinstance(gate, Relu):
        d = _made(
            (Block(n, tuple(sites), tuple(sites)),),
            [shared],
            [dict(zip(sites, decoder, strict=True))],
            [bias],
            dict(zip(sites, b_dec, strict=True)),
            [gate],
            scales,
            config,
        )
        return replace(d, norm_aware=False)
    return _made(
        tuple(Block(n, tuple(sites), (s,)) for s in sites),
        [shared for _ in sites],
        [{s: d} for s, d in zip(sites, decoder, strict=True)],
        [bias for _ in sites],
        dict(zip(sites, b_dec, strict=True)),
        [gate for _ in sites],
        scales,
        config,
    )


def _made(
    blocks: tuple[Block, ...],
    encoder: list[dict[str, Tensor]],
    decoder: list[dict[str, Tensor]],
    b_enc: list[Tensor],
    b_dec: dict[str, Tensor],
    gates: list[Gate],
    scales: dict[str, Norm | None],
    config: Mapping[str, Any],
) -> Dictionary:
    reads = {s for b in blocks for s in b.reads}
    if any(isinstance(n, TokenNorm) for n in scales.values()):
        raise Refused("dictionary", "each token's outputs are scaled by their own norms", "retrain it")
    d = Dictionary(
        blocks,
        tuple(encoder),
        tuple(decoder),
        tuple(b_enc),
        b_dec,
        tuple(gates),
        norm_aware=_aware(config),
        reading={s: n for s, n in scales.items() if n is not None and s in reads},
        writing={s: n for s, n in scales.items() if n is not None and s in b_dec},
        about={"format": NAME},
    )
    return d.to(dtype=torch.promote_types(d.dtype, torch.float32))


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write one block, a cross-layer transcoder, or a crosscoder as this format has them, as a folder.

    Raises:
        Refused: the format cannot hold it.
    """
    d = jumping(dictionary)
    config: dict[str, Any] = {"norm_activation": "inference", "sparsity_include_decoder_norm": False}
    if len(d.blocks) == 1 and len(d.reads) == len(d.writes) == 1:
        s = simple(d, NAME, subtract=False)
        if s.encoder is None or s.b_enc is None:
            raise unheld(d, NAME, s.gate)
        tensors = {"W_E": s.encoder.T, "b_E": s.b_enc, "W_D": s.decoder, "b_D": s.b_dec}
        config |= {"sae_type": "sae", SITE_IN: hook_of_site(s.site), SITE_OUT: hook_of_site(s.target)}
        gates: list[Gate] = [s.gate]
    elif all(set(b.reads) == set(d.writes) for b in d.blocks) and (len(d.blocks) == 1 or _each_writes_one(d)):
        tensors, gates = _together(d) if len(d.blocks) == 1 else (_heads(d), [d.gates[0]])
        config |= {
            "sae_type": "crosscoder",
            SITES_BOTH: [hook_of_site(s) for s in d.writes],
            "sparsity_include_decoder_norm": True,
        }
    else:
        d = subtracting(fold(d), False)
        tensors, gates = _layers(d), list(d.gates)
        config |= {
            "sae_type": "clt",
            SITES_IN: [hook_of_site(s) for s in d.reads],
            SITES_OUT: [hook_of_site(s) for s in d.writes],
        }
    more, words = _gated(d, gates)
    width = tensors["W_E"].shape[-2]
    config |= words | {"d_model": width, "expansion_factor": tensors["W_E"].shape[-1] / width}
    write_plain(Path(path) / WEIGHTS, tensors | more)
    write_config(Path(path) / CONFIG, config)
    return Path(path)


def _gated(d: Dictionary, gates: list[Gate]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    first = gates[0]
    if any(type(g) is not type(first) for g in gates):
        raise Refused(f"{d!r} as {NAME}", "its blocks have different gates", "choose another format")
    if isinstance(first, JumpRelu):
        theta = torch.stack([g.threshold for g in gates if isinstance(g, JumpRelu)])
        if bool((theta < 0).any()):
            raise Refused(f"{d!r} as {NAME}", "the format has thresholds ≥ 0", "choose another format")
        return {_LOG: theta.log() if len(gates) > 1 else theta[0].log()}, {"act_fn": "jumprelu"}
    if isinstance(first, TopK) and all(isinstance(g, TopK) and g.k == first.k and not g.signed for g in gates):
        return {}, {"act_fn": "topk", "top_k": first.k}
    if isinstance(first, Relu):
        return {}, {"act_fn": "relu"}
    raise unheld(d, NAME, first)


def _each_writes_one(d: Dictionary) -> bool:
    return all(b.writes == (w,) for b, w in zip(d.blocks, d.writes, strict=False))


def _together(d: Dictionary) -> tuple[dict[str, Tensor], list[Gate]]:
    """Return a crosscoder whose sites share one gate: each of the format's compares π with θ / n of its own decoder."""
    d = subtracting(fold(d), False)
    if d.reading or d.writing or d.skip or len({d.width(s) for s in d.writes}) > 1:
        why = "its crosscoders have sites of one width, no skip, and scale all tokens alike"
        raise Refused(f"{d!r} as {NAME}", why, "choose another format")
    gate, decoder = d.gate, torch.stack([d.decoder[0][s] for s in d.writes])
    if isinstance(gate, JumpRelu):
        theta = gate.threshold * decoder.norm(dim=2)
        gate = replace(gate, threshold=theta[0])
        if not torch.allclose(theta, theta[:1].expand_as(theta), rtol=1e-6):
            why = "its crosscoders gate each site by its own decoder's norm, and here all sites share one threshold"
            raise Refused(f"{d!r} as {NAME}", why, "write it as dictionary_learning_crosscoder")
    elif not isinstance(gate, Relu):
        raise unheld(d, f"{NAME} crosscoder", gate)
    bias = torch.zeros(len(d.writes), len(d.b_enc[0]), dtype=d.dtype)
    bias[0] = d.b_enc[0]
    tensors = {
        "W_E": torch.stack([d.encoder[0][s].T for s in d.writes]),
        "b_E": bias,
        "W_D": decoder,
        "b_D": torch.stack([d.b_dec[s] for s in d.writes]),
    }
    return tensors, [gate]


def _heads(d: Dictionary) -> dict[str, Tensor]:
    sites, first = d.writes, d.encoder[0]
    shared = all(torch.equal(e[s], first[s]) for e in d.encoder for s in sites)
    same = all(torch.equal(b, d.b_enc[0]) for b in d.b_enc)
    learned = [tensors_of(g) for g in d.gates]
    gates_same = all(numbers_of(g) == numbers_of(d.gates[0]) for g in d.gates) and all(
        torch.equal(g[n], t) for g in learned for n, t in learned[0].items()
    )
    if not (shared and same and gates_same and d.norm_aware) or d.reading or d.writing or d.subtract_b_dec or d.skip:
        raise Refused(
            f"{d!r} as {NAME}",
            "its crosscoders share one encoder and gate each site by its decoder's norm",
            "choose another format",
        )
    bias = torch.zeros(len(sites), len(d.b_enc[0]), dtype=d.dtype)
    bias[0] = d.b_enc[0]
    return {
        "W_E": torch.stack([first[s].T for s in sites]),
        "b_E": bias,
        "W_D": torch.stack([d.decoder[i][s] for i, s in enumerate(sites)]),
        "b_D": torch.stack([d.b_dec[s] for s in sites]),
    }


def _layers(d: Dictionary) -> dict[str, Tensor]:
    n, writes = len(d.blocks), d.writes
    fits = len(writes) == n and all(
        len(b.reads) == 1 and set(b.writes) == set(writes[i:]) for i, b in enumerate(d.blocks)
    )
    if not fits or d.reading or d.writing or d.skip or len({b.n_latents for b in d.blocks}) > 1:
        raise Refused(f"{d!r} as {NAME}", "the format holds cross-layer transcoders without skip", "write its blocks")
    tensors = {
        "W_E": torch.stack([e[r].T for e, r in zip(d.encoder, d.reads, strict=True)]),
        "b_E": torch.stack(list(d.b_enc)),
    }
    for m, w in enumerate(writes):
        tensors |= {f"W_D.{m}": torch.stack([d.decoder[i][w] for i in range(m + 1)]), f"b_D.{m}": d.b_dec[w]}
    return tensors
