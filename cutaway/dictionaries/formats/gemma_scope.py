"""Gemma Scope 1: `params.npz` with `W_enc` [width, latent], `W_dec` [latent, width], `b_enc`, `b_dec`, `threshold`.

It has no configuration: layer, width and L0 are in the path (`layer_20/width_16k/average_l0_71`), the site is in the
repository's name (`…-pt-res`, `-mlp`, `-att`, `-transcoders`). Those of embeddings were trained on embeddings divided
by √width. The transcoders read the norm before the MLP without its weight, which was folded into the MLP
(Lieberum et al. 2024, arXiv:2408.05147).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import Files, asked, layer_in, taken, write_npz
from cutaway.dictionaries.formats.shared.simple import Simple, before_weight, simple, unheld
from cutaway.dictionaries.gates import JumpRelu
from cutaway.dictionaries.transforms import jumping

NAME = "gemma_scope"
_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "z"}
_KEYS = {"w_enc": "W_enc", "w_dec": "W_dec"}


def detect(files: Files) -> bool:
    """True if a folder or file holds a dictionary in this format."""
    found = files.shapes(files.only("*.npz"))
    return {_KEYS.get(n, n) for n in found} >= {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}


def read(
    files: Files,
    *,
    site: str | None = None,
    target: str | None = None,
    embedding: bool | None = None,
    norm_weight: Tensor | Literal["included"] | None = None,
) -> Dictionary:
    """Read the dictionary. What the path does not say must be said: `site`, for a transcoder `target`, `embedding`.

    `norm_weight` is the weight of the norm before the MLP as it multiplies (1 + w in this family); a transcoder was
    trained before it. "included" leaves the dictionary as it is.
    """
    file = str(files.only("*.npz"))
    tensors = {_KEYS.get(n, n): t for n, t in files.tensors(file).items()}
    encoder, decoder, b_enc, b_dec, threshold = taken(
        files, file, ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"], tensors
    )
    words = files.words
    if embedding is None:
        embedding = "/embedding" in words
    coder = target is not None or (site is None and bool(re.search(r"transcoder", words)))
    layer = layer_in(words, r"layer_(\d+)")
    if site is None:
        site = "embed" if embedding else _named(words, layer, coder)
    site = asked(site, "site", "which site and layer it reads is not in its path", files)
    if coder and target is None and layer is not None:
        target = f"mlp_out.{layer}"
    if embedding:
        root = float(encoder.shape[0]) ** 0.5
        encoder, decoder = encoder / root, decoder * root
    l0 = layer_in(words, r"average_l0_(\d+)")
    made = Simple(
        site,
        target or site,
        encoder.T,
        decoder,
        b_enc,
        b_dec,
        JumpRelu(threshold),
        about={"format": NAME, "declared_l0": l0},
    ).dictionary()
    if not coder:
        return made
    weight = asked(norm_weight, "norm_weight", f"it reads {site} before the norm's weight is multiplied in", files)
    return made if isinstance(weight, str) else before_weight(made, site, weight)


def _named(words: str, layer: int | None, coder: bool) -> str | None:
    if layer is None:
        return None
    if coder:
        return f"mlp_in.{layer}"
    found = re.findall(rf"-({'|'.join(_SITES)})(?=[/-]|$)", words)
    return f"{_SITES[found[-1]]}.{layer}" if found else None


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a dictionary as `params.npz` in a folder; the path must tell what the file cannot.

    Raises:
        Refused: the format cannot hold it.
    """
    s = simple(jumping(dictionary), NAME, subtract=False)
    if not isinstance(s.gate, JumpRelu) or s.encoder is None:
        raise unheld(dictionary, NAME, s.gate)
    tensors = {
        "W_enc": s.encoder.T,
        "W_dec": s.decoder,
        "b_enc": s.b_enc,
        "b_dec": s.b_dec,
        "threshold": s.gate.threshold,
    }
    write_npz(Path(path) / "params.npz", {n: t.to(torch.float32) for n, t in tensors.items() if t is not None})
    return Path(path)
