"""OpenAI's autoencoders of GPT-2: one `.pt` file with `pre_bias` [width], `encoder.weight` [latent, width],
`latent_bias` [latent], `decoder.weight` [width, latent], and the words `activation` and `activation_state_dict`.

With `activation` "TopK" every token is normalised (mean, then unbiased standard deviation + 1e-5), and the output is
taken back; the ReLU versions are not. A file without `decoder.weight` is tied.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cutaway.core.pt import write_pt
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.shared.files import PT, Files, asked, layer_in, taken
from cutaway.dictionaries.formats.shared.simple import Simple, simple, unheld
from cutaway.dictionaries.gates import Relu, TopK
from cutaway.dictionaries.norms import TokenLayerNorm

NAME = "openai"
_LOCATIONS = {
    "mlp_post_act": "mlp_post", "resid_delta_attn": "attn_out", "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out", "resid_post_mlp": "resid_post",
}  # fmt: skip


def detect(files: Files) -> bool:
    """True if a folder or file holds a dictionary in this format."""
    return set(files.shapes(_file(files))) >= {"pre_bias", "latent_bias", "encoder.weight"}


def _file(files: Files) -> str | None:
    return files.only(*(f"*{end}" for end in PT))


def read(files: Files, *, site: str | None = None) -> Dictionary:
    """Read the dictionary; `site` is asked for where the path does not tell location and layer."""
    file = str(_file(files))
    held = files.held(file)
    encoder, b_enc, b_dec = taken(files, file, ["encoder.weight", "latent_bias", "pre_bias"], files.tensors(file))
    decoder = held["decoder.weight"].T if "decoder.weight" in held else encoder
    activation = held.get("activation", "ReLU")
    found = next((s for n, s in _LOCATIONS.items() if n in files.words), None)
    layer = layer_in(files.words, r"/(\d+)\.pt", r"layer_(\d+)")
    if site is None and found is not None and layer is not None:
        site = f"{found}.{layer}"
    site = asked(site, "site", "which site and layer it reads is not in its path", files)
    if activation not in ("TopK", "ReLU"):
        raise Refused(f"file {file!r}", f"its activation {activation!r} is not known", "convert it")
    k = held.get("activation_state_dict", {}).get("k")
    after = held.get("activation_state_dict", {}).get("postact_fn", "ReLU")
    if activation == "TopK" and (k is None or after != "ReLU"):
        raise Refused(f"file {file!r}", f"its TopK has k = {k} and then {after}", "k and ReLU are known here")
    norm = TokenLayerNorm(1e-5) if activation == "TopK" else None
    gate = TopK(int(k)) if activation == "TopK" else Relu()
    return Simple(
        site,
        site,
        encoder,
        decoder,
        b_enc,
        b_dec,
        gate,
        subtract=True,
        reading=norm,
        writing=norm,
        about={"format": NAME},
    ).dictionary()


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a dictionary as one file.

    Raises:
        Refused: the format cannot hold it; TopK must normalise every token, ReLU must not.
    """
    s = simple(dictionary, NAME, subtract=True, norms=True)
    top = isinstance(s.gate, TopK)
    if s.site != s.target or s.encoder is None or s.b_enc is None or not (top or isinstance(s.gate, Relu)):
        raise unheld(dictionary, NAME, s.gate)
    norms = [s.reading, s.writing]
    right = all(isinstance(n, TokenLayerNorm) and n.eps == 1e-5 for n in norms) if top else norms == [None, None]
    if not right:
        raise Refused(f"{dictionary!r} as {NAME}", "TopK normalises every token there, ReLU none", "choose another")
    n = len(s.decoder)
    content = {
        "pre_bias": s.b_dec,
        "latent_bias": s.b_enc,
        "encoder.weight": s.encoder,
        "decoder.weight": s.decoder.T.contiguous(),
        "stats_last_nonzero": torch.zeros(n, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(n),
        "latents_mean_square": torch.zeros(n),
        "activation": "TopK" if top else "ReLU",
    }
    if isinstance(s.gate, TopK):
        content["activation_state_dict"] = {"k": s.gate.k, "postact_fn": "ReLU"}
    return write_pt(path, content)
