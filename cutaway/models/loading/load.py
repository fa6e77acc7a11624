"""Loading: a Hugging Face id, a local folder, or a live model. Code always comes from transformers itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cutaway.core.files import read_json
from cutaway.core.out_of_memory import is_out_of_memory
from cutaway.core.refuse import Keyword, OutOfMemory, Refused
from cutaway.models.anatomy.families import reads_as_encoder
from cutaway.models.loading import adapters, gguf, multimodal
from cutaway.models.loading.gguf_header import Header
from cutaway.models.loading.gguf_settings import complete
from cutaway.models.loading.identity import ORIGINS
from cutaway.models.loading.provenance import loaded, pinned
from cutaway.models.loading.sources import check_device, check_dtype, own_progress
from cutaway.models.loading.wrappers import inner
from cutaway.models.model import Model
from cutaway.models.self_check import checked
from cutaway.models.sweep import processes as shards

_WIDTH = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
CACHE = Path("~/.cache/cutaway/self_check")


def load(
    x: Any,
    *,
    tokenizer: Any = None,
    name: str = "",
    world: Any = None,
    device: str | dict[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    attention: str | None = None,
    check: bool = True,
) -> Model:
    """Return a `Model` from a Hugging Face id (`org/name`, `org/name@revision`), a local folder, a GGUF file, or a live
    `PreTrainedModel`.

    A folder or id may be that of an adapter of PEFT (with the extra `peft`), which is merged into the model it names.
    A GGUF file (with the extra `gguf`) is a path, a blob or manifest of Ollama, or a name that Ollama has pulled
    (`ollama:llama3.2:1b`); its weights are dequantised.

    Loaded weights are float32 on the CPU and the checkpoint's dtype elsewhere, unless `dtype` says otherwise; a live
    model is taken as it is. `device` is one device; "auto" or a map from modules to devices spreads the model over
    several (with accelerate); "tensor_parallel" splits its weights over the processes of torchrun, where sites inside
    attention and MLP are then refused. `attention` is transformers' implementation name. `check` runs the self-check
    once per architecture and disables what fails it.

    Raises:
        Refused: unknown or broken source, remote code, pickled weights, too little memory, unknown structure.
    """
    options = {
        "tokenizer": tokenizer,
        "name": name,
        "world": world,
        "device": device,
        "dtype": dtype,
        "attention": attention,
        "check": check,
    }
    if isinstance(x, torch.nn.Module):
        hf = inner(x)
        if device is not None or dtype is not None:
            raise Refused(
                (Keyword("device", of="model"), " or ", Keyword("dtype", of="model"), " with a live model"),
                "your model stays as it is",
                "move it yourself before load",
            )
    else:
        hf, tokenizer, own = _from_source(str(x), tokenizer, device, dtype, attention)
        name = name or own
    with multimodal.said_of(hf if isinstance(x, torch.nn.Module) else None):
        model = Model(hf, tokenizer, name, world)
    if check and model.device.type != "meta":
        model.disabled.update(checked(model, None if model.disabled else CACHE.expanduser()))
    if not isinstance(x, torch.nn.Module):
        model.made = loaded(model, pinned(model, str(x)), options)
    return model


def _from_source(
    source: str,
    tokenizer: Any,
    device: str | dict[str, Any] | None,
    dtype: torch.dtype | str | None,
    attention: str | None,
) -> tuple[Any, Any, str]:
    """Return the model, the tokenizer or None, and a name."""
    from transformers import AutoTokenizer

    name, revision = _revised(source)
    adapter = adapters.adapter_folder(name, **revision)
    if adapter is not None:
        base = adapters.base_of(adapters.read_adapter(adapter))
        hf, its, _ = _from_source(base, tokenizer, device, dtype, attention)
        hf, origin = adapters.merged(hf, adapter)
        ORIGINS[hf.requires_grad_(False)] = origin
        return hf, tokenizer or adapters.tokenizer_of(adapter, its, AutoTokenizer.from_pretrained), _named(source)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    spread = _spread(device)
    if not spread:
        check_device(str(device))
    if dtype is not None:
        check_dtype(dtype)
    dtype = dtype or (torch.float32 if device == "cpu" or not torch.cuda.is_available() else "auto")
    with _located(source, dtype if device == "cpu" else None) as (where, header):
        options: dict[str, Any] = {"dtype": dtype, **spread}
        if attention is not None:
            options["attn_implementation"] = attention
        with _translated(source, header):
            hf = _pretrained(where, header, options)
            hf = hf if spread or hf.device == torch.device(str(device)) else hf.to(device)
        hf.requires_grad_(False)
        if tokenizer is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
            except Exception:
                # A folder without tokenizer is still a model: text prompts are then refused with this as the reason.
                tokenizer = None
    if header is None:
        return hf, tokenizer, _named(source)
    ORIGINS[hf] = gguf.origin(header)
    return hf, tokenizer, gguf.named(source, header)


@contextmanager
def _located(source: str, dtype: torch.dtype | str | None) -> Iterator[tuple[dict[str, Any], Header | None]]:
    """Within the block, the place that transformers loads a source from, as options; and the header of a GGUF file.

    With `dtype`, weights that will not fit into memory in it are refused.
    """
    file = gguf.gguf_file(source)
    if file is not None:
        header = gguf.checked_header(file)
        if dtype is not None:
            width = _WIDTH.get(str(dtype).removeprefix("torch."), 4)
            _check_memory(str(file), width * sum(t.numel for t in header.tensors))
        with gguf.alone(file) as where:
            yield where, header
        return
    folder = Path(source).expanduser()
    if folder.exists():
        _check_folder(folder)
        source = str(folder)
        if dtype is not None:
            _check_memory(source, _needed(folder, dtype))
    source, revision = _revised(source)
    yield {"pretrained_model_name_or_path": source, **revision}, None


def _pretrained(where: dict[str, Any], header: Header | None, options: dict[str, Any]) -> Any:
    """Return the model that transformers makes of a place."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    whole = AutoConfig.from_pretrained(**where, trust_remote_code=False)
    config = multimodal.text_part(whole)
    if config is not whole:
        options = {**options, "key_mapping": multimodal.key_mapping(config)}
    if header is not None:
        complete(config, header)
        options = {**options, **gguf.dequantised()}
    auto: Any = AutoModelForMaskedLM if reads_as_encoder(config) else AutoModelForCausalLM
    with own_progress(reports=config is whole and header is None):
        hf, told = auto.from_pretrained(
            **where, config=config, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
        )
    if header is not None:
        gguf.finish(hf, header, set(told["missing_keys"]))
    elif missing := _random(hf, set(told["missing_keys"])):
        some = ", ".join(missing[:3])
        why = f"the checkpoint has no weights for {len(missing)} places of a {type(hf).__name__} ({some})"
        source = where["pretrained_model_name_or_path"]
        raise Refused(f"model {source!r}", f"{why}, which would be random", "give a checkpoint of a language model")
    if config is not whole:
        ORIGINS[hf] = {"format": "multimodal", "of": whole.model_type, "part": "text"}
    return hf.eval()


def _random(hf: Any, missing: set[str]) -> list[str]:
    """Return the parameters that no weight of the checkpoint was put into, also not by being tied to another one."""
    named = dict(hf.named_parameters(remove_duplicate=False))
    filled = {id(p) for name, p in named.items() if name not in missing}
    return sorted(name for name, p in named.items() if id(p) not in filled)


@contextmanager
def _translated(source: str, header: Header | None) -> Iterator[None]:
    """Within the block, what goes wrong while loading becomes a refusal."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            why = "the memory is not enough for its weights"
            way = ("use a smaller one or ", Keyword("dtype", "bfloat16", of="model"))
            raise OutOfMemory(f"model {source!r}", why, way) from error
        if header is not None:
            raise gguf.unreadable(header, error) from error
        raise _unloadable(source, Path(source).expanduser().exists(), error) from error


def _named(source: str) -> str:
    return Path(_revised(source)[0]).name


def _revised(source: str) -> tuple[str, dict[str, str]]:
    """Return a source and its revision, where a name of the hub has one: `org/name@revision`."""
    if Path(source).expanduser().exists() or "@" not in source:
        return source, {}
    name, _, revision = source.partition("@")
    return name, {"revision": revision}


def _spread(device: str | dict[str, Any]) -> dict[str, Any]:
    """Return the options by which transformers places the weights; none if one device takes all of them.

    Raises:
        Refused: a placement that needs accelerate, or several processes, without them.
    """
    if device == "tensor_parallel":
        if shards.processes() == 1:
            raise Refused(
                Keyword("device", "tensor_parallel", of="model"),
                "there is one process",
                "start with torchrun --nproc-per-node N",
            )
        return {"tp_plan": "auto"}
    if device != "auto" and not isinstance(device, dict):
        return {}
    if find_spec("accelerate") is None:
        raise Refused(
            Keyword("device", device, of="model"),
            "placing a model on several devices needs accelerate",
            "pip install accelerate",
        )
    return {"device_map": device}


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be a safe checkpoint, before anything is read from it."""
    config = folder / "config.json"
    if not folder.is_dir() or not config.exists():
        raise Refused(
            f"model {str(folder)!r}", "there is no config.json in it", "give the folder that save_pretrained wrote"
        )
    if "auto_map" in read_json(config):
        raise Refused(
            f"model {str(folder)!r}", "it wants to run its own Python code", "use an architecture of transformers"
        )
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        pickled = [p.name for p in folder.glob("*.bin")]
        why = f"only pickled weights are there ({pickled[0]}), which can run code" if pickled else "it has no weights"
        raise Refused(f"model {str(folder)!r}", why, "save it as safetensors with save_pretrained")


def _needed(folder: Path, dtype: torch.dtype | str) -> float:
    """Return the bytes that the weights of a folder take in the dtype that they are to have."""
    stored = read_json(folder / "config.json")
    stored = str(stored.get("dtype") or stored.get("torch_dtype") or "float32")
    wanted = stored if dtype == "auto" else str(dtype).removeprefix("torch.")
    growth = _WIDTH.get(wanted, 4) / _WIDTH.get(stored, 4)
    return growth * sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def _check_memory(source: str, need: float) -> None:
    """Refuse weights that will not fit."""
    free = _free_memory()
    if free is not None and need > free:
        gib = f"its weights need {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
        raise Refused(f"model {source!r}", gib, "use a smaller one, or a machine with more memory")


def _free_memory() -> int | None:
    """Return the bytes that can be had; file caches, which the system gives up when asked, count as free."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = [line.split() for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
        if found:
            return int(found[0][1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _unloadable(source: str, local: bool, error: Exception) -> Refused:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
    if local:
        return Refused(
            f"model {source!r}", f"the folder cannot be loaded: {reason}", "check that the download is complete"
        )
    if source.count("/") != 1:
        return Refused(
            f"model {source!r}",
            "there is no such zoo model and no such folder",
            "try miniworld, a folder, a GGUF file, ollama:NAME, or org/name",
        )
    way = "check the name and the network, or give a folder"
    if "gguf" in source.lower():
        way = f"name one of its files ({source.partition('@')[0]}/FILE.gguf), or give a file that you have"
    return Refused(f"model {source!r}", f"it could not be fetched: {reason}", way)
