"""Adapters of PEFT: folders that hold one alone, merged into the model they were made for; and those of live models."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from cutaway.core.files import read_json
from cutaway.core.refuse import Refused

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OUTSIDE = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT")
_FILES = [CONFIG, WEIGHTS, "token*", "special_tokens*", "vocab*", "merges*", "*.jinja"]
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def adapter_folder(source: str, revision: str | None = None) -> Path | None:
    """Return the folder of the adapter meant by a source, fetched if it is on the hub; None for anything else.

    Raises:
        Refused: a folder with both an adapter and the weights of a model.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        return _on_hub(source, revision)
    if not (folder / CONFIG).is_file():
        return None
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        why = "it holds both an adapter of PEFT and the weights of a model, and only one of them can be meant"
        raise Refused(f"model {str(folder)!r}", why, f"move {CONFIG} or the model's files into a folder of their own")
    return folder


def read_adapter(folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter that can be merged into the model it names.

    Raises:
        Refused: without the package peft, pickled or missing weights, no model named, prompts instead of weights.
    """
    what, config = f"model {str(folder)!r}", read_json(folder / CONFIG)
    config = config if isinstance(config, dict) else {}
    base, kind = config.get("base_model_name_or_path"), str(config.get("peft_type"))
    if not isinstance(base, str) or not base:
        why = f"it holds an adapter of PEFT, and {CONFIG} does not name the model it was made for"
        raise Refused(what, why, "write its name or folder there as base_model_name_or_path")
    if Path(base).expanduser().resolve() == folder.resolve():
        raise Refused(what, f"{CONFIG} says that it was made for itself", "write the model's name or folder there")
    if kind in _OUTSIDE or config.get("megatron_config"):
        way = "write the prompt as text, or use an adapter on weights (LoRA)"
        raise Refused(what, f"it holds an adapter of the kind {kind}, which is not in the weights of {base!r}", way)
    if not (folder / WEIGHTS).is_file():
        held = (
            f"only pickled weights are there ({found.name})" if (found := folder / "adapter_model.bin").exists() else ""
        )
        way = "save it as safetensors with save_pretrained, or download it again"
        raise Refused(what, f"it holds an adapter of PEFT without its {WEIGHTS}{': ' if held else ''}{held}", way)
    if find_spec("peft") is None:
        why = f"it holds an adapter of PEFT for {base!r}, and the package peft is not here"
        raise Refused(what, why, "pip install 'cutaway[peft]'")
    return config


def base_of(config: Mapping[str, Any]) -> str:
    """Return the source of the model that an adapter was made for."""
    base, revision = str(config["base_model_name_or_path"]), config.get("revision")
    there = Path(base).expanduser().exists()
    return f"{base}@{revision}" if revision and revision != "main" and not there else base


def merged(hf: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return a model with an adapter in its weights, and what records say about it.

    Weights that are quantised stay, and the adapter is live beside them.

    Raises:
        Refused: an adapter that does not fit the model.
    """
    import peft
    from safetensors import safe_open

    config = read_json(folder / CONFIG)
    with safe_open(folder / WEIGHTS, "pt") as file:
        tables = [k for k in file.keys() if k.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight"))]  # noqa: SIM118
        rows = max((file.get_slice(k).get_shape()[0] for k in tables), default=0)
    if rows and rows != hf.get_input_embeddings().num_embeddings:
        hf.resize_token_embeddings(rows, mean_resizing=False)  # the adapter brings its own
    what = f"model {str(folder)!r}"
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            wrapped = peft.PeftModel.from_pretrained(hf, str(folder))
        missing = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
        if missing:
            raise ValueError(missing[0])
    except Exception as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        why = f"its adapter does not fit {config['base_model_name_or_path']!r}: {said}"
        raise Refused(what, why, "check base_model_name_or_path and its revision in " + CONFIG) from error
    quantised = bool(getattr(hf, "is_quantized", False))
    hf = wrapped.get_base_model() if quantised else wrapped.merge_and_unload(safe_merge=True)
    origin = {
        "format": "PEFT",
        "adapter": str(config.get("peft_type")),
        "base": str(config["base_model_name_or_path"]),
        "merged": not quantised,
    }
    if not quantised and hasattr(hf, "peft_config"):
        del hf.peft_config  # what is merged does not count as an adapter
    return hf.eval(), origin


def tokenizer_of(folder: Path, otherwise: Any, load: Callable[..., Any]) -> Any:
    """Return the tokenizer that lies beside an adapter, else the model's."""
    if not any((folder / name).is_file() for name in _TOKENIZER):
        return otherwise
    return load(str(folder), trust_remote_code=False)


def live(hf: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the adapters on a model by name: their kind, and their state (active, merged, off)."""
    found: dict[str, dict[str, Any]] = {}
    for module in hf.modules():
        kind = type(module).__module__.split(".")
        if kind[0] != "peft" or not hasattr(module, "active_adapters"):
            continue
        active, inside = list(module.active_adapters), set(getattr(module, "merged_adapters", ()))  # type: ignore[arg-type]
        names = {n for part in getattr(module, "adapter_layer_names", ()) for n in getattr(module, part, ())}
        for name in sorted(names | inside):
            off = bool(getattr(module, "disable_adapters", False)) or name not in active
            found[name] = {"kind": kind[2], "state": "merged" if name in inside else "off" if off else "active"}
    return found


def _on_hub(source: str, revision: str | None) -> Path | None:
    """Return the folder of an adapter on the hub, which is asked unless a model of that name is in the cache."""
    from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache

    if source.count("/") != 1:
        return None
    try:
        if isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
            return None
        hf_hub_download(source, CONFIG, revision=revision)
        return Path(snapshot_download(source, allow_patterns=_FILES, revision=revision))
    except Exception:
        return None  # no adapter, or not to be had: loading it as a model says why
