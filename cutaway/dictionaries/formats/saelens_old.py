"""SAELens 3 to 5: the same two files as later versions, their `cfg.json` flat and with older keys.

Optional `scaling_factor` [latent]: with `finetuning_scaling_factor`, x̂ = (f · s) W_dec + b_dec.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats import saelens
from cutaway.dictionaries.formats.shared.files import Files, asked, write_config, write_plain
from cutaway.models.anatomy.foreign_names import OLDER_KEYS

NAME = "saelens_old"
CONFIG, WEIGHTS = saelens.CONFIG, saelens.WEIGHTS


def detect(files: Files) -> bool:
    """True if a folder holds a dictionary in this format."""
    config = files.json(CONFIG)
    return files.has(WEIGHTS) and bool(config) and "metadata" not in config and "W_dec" in files.shapes(WEIGHTS)


def read(
    files: Files,
    *,
    site: str | None = None,
    target: str | None = None,
    norm_weight: Tensor | Literal["included"] | None = None,
    norm_bias: Tensor | None = None,
    centered: bool | None = None,
    use_scaling_factor: bool | None = None,
) -> Dictionary:
    """Read the dictionary; choices as for later versions.

    `use_scaling_factor` says whether a `scaling_factor` counts where the configuration does not say it.
    """
    config = modern(files.json(CONFIG))
    tensors = files.tensors(WEIGHTS)
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and bool((factor != 1).any()):
        used = use_scaling_factor
        if used is None and config.get("finetuning_scaling_factor"):
            used = True
        question = "it has a scaling_factor that its configuration does not speak of; does it count?"
        if asked(used, "use_scaling_factor", question, files):
            tensors["W_dec"] = tensors["W_dec"] * factor[:, None]
    return saelens.assembled(files, config, tensors, NAME, site, target, norm_weight, norm_bias, centered)


def modern(config: dict[str, Any]) -> dict[str, Any]:
    """Return a flat configuration in later words."""
    new = {"prepend_bos": True, **{OLDER_KEYS.get(k, k): v for k, v in config.items()}}
    k = (new.get("activation_fn_kwargs") or {}).get("k")
    if new.get("activation_fn") == "topk" and k is not None:
        new |= {"architecture": "topk", "k": k}
    if isinstance(new.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if new["normalize_activations"] else "none"
    return new


def write(dictionary: Dictionary, path: str | Path) -> Path:
    """Write a dictionary as a folder in this format, folded.

    Raises:
        Refused: the format cannot hold it.
    """
    config, tensors = saelens.described(dictionary)
    kind = config["architecture"]
    if kind not in ("standard", "gated", "jumprelu", "topk"):
        raise Refused(f"{dictionary!r} as {NAME}", f"those versions had no {kind}", f"write it as {saelens.NAME}")
    flat = {**{n: v for n, v in config.items() if n != "metadata"}, **config["metadata"], "sae_lens_version": "5.0.0"}
    if kind == "topk":
        flat |= {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": flat.pop("k")}}
    write_plain(Path(path) / WEIGHTS, tensors)
    write_config(Path(path) / CONFIG, flat)
    return Path(path)
