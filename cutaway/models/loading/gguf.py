"""GGUF files (llama.cpp, Ollama): recognised by their first bytes, checked, and turned into a model by transformers.

Transformers dequantises the weights and builds the configuration and the tokenizer. The functions here tell a model
from a damaged file, a part of one or an unknown architecture, and make sure that no weight of the file is left out.
They divide rotary frequencies by the factors of the file (Llama 3.1), which transformers does not read; settings that
it leaves at its own defaults are in `gguf_settings`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cutaway.core.refuse import Refused
from cutaway.models.loading.gguf_header import MAGIC, Header, read_header
from cutaway.models.loading.sources import telling

#: where Ollama keeps its models: its user's home, and the service's on Linux
OLLAMA = (Path("~/.ollama/models"), Path("/usr/share/ollama/.ollama/models"))
_ORIGINAL = "load the checkpoint that the file was made from (org/name, or a folder with config.json)"
_FREQUENCIES = "rope_freqs.weight"  # factors of the rotary frequencies, which are no weight of the model
_ON_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)/(?P<name>[\w./-]+\.gguf)(?:@(?P<revision>.+))?")
# rules of splitting text for which GPT-2's gives the same tokens: its own, and those that set digits apart
_AS_GPT2 = ("default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2", "smollm", "starcoder")
_BYTE_LEVEL = ("gpt2",)  # the kind of tokenizer that such rules are of
_ASKED = re.compile(r"ollama:(?P<name>[\w./-]+?)(?::(?P<tag>[\w.-]+))?")


def gguf_file(source: str) -> Path | None:
    """Return the GGUF file meant by a source: a file, a folder with one such file, a file of the hub
    (`org/name/file.gguf`), a blob, a manifest or a name of Ollama (`ollama:llama3.2:1b`); None for any other source.

    Raises:
        Refused: a folder with several files, or a name that the hub or Ollama does not have.
    """
    try:
        return _file_of(source)
    except PermissionError as error:
        why = f"{error.filename} may not be read by you"
        raise Refused(
            f"model {source!r}", why, "copy the file into a folder of yours, or ask for the permission"
        ) from error


def _file_of(source: str) -> Path | None:
    asked, path = _ASKED.fullmatch(source), Path(source).expanduser()
    if asked is not None and not path.exists():
        return _pulled(source, asked["name"], asked["tag"] or "latest")
    if not path.exists() and (found := _ON_HUB.fullmatch(source)) is not None:
        return _fetched(source, **found.groupdict())
    if path.is_file():
        return path if path.suffix == ".gguf" or _starts(path) else _of_manifest(path)
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(f.name for f in files[:4]) + (", …" if len(files) > 4 else "")
        raise Refused(f"model {source!r}", f"the folder holds several GGUF files: {names}", "give one of the files")
    return files[0] if files else None


def checked_header(file: Path) -> Header:
    """Return the header of a file that transformers may be given.

    Raises:
        Refused: packages that are missing, a file that is damaged or cut off, one part of several, or a projector.
    """
    missing = [p for p in ("gguf", "accelerate") if find_spec(p) is None]
    if missing:
        why = f"GGUF files are read with {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not here"
        raise Refused(f"model {str(file)!r}", why, "pip install 'cutaway[gguf]'")
    header = read_header(file)
    parts = int(header.fields.get("split.count") or 1)
    if parts > 1:
        way = f"join them with llama.cpp (llama-gguf-split --merge {file.name} whole.gguf) and load the whole file"
        raise Refused(f"model {str(file)!r}", f"it is one of {parts} parts", way)
    if header.architecture in ("clip", "mmproj"):
        why = "it holds the part of a multimodal model that reads images"
        raise Refused(f"model {str(file)!r}", why, "give the file with its language model")
    return header


@contextmanager
def alone(file: Path) -> Iterator[dict[str, str]]:
    """Within the block, the options by which transformers loads one file, without what lies beside it.

    Raises:
        Refused: a file system on which the file cannot be linked to.
    """
    with TemporaryDirectory(prefix="cutaway-gguf-") as folder:
        try:
            (Path(folder) / "model.gguf").symlink_to(file.absolute())
        except OSError as error:
            why = f"no link to it can be made: {error.strerror}"
            raise Refused(
                f"model {str(file)!r}", why, "put the file alone into a folder of a Linux file system"
            ) from error
        with _parsed_once():
            yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Within the block, transformers, which would make the header and the map of names again and again, makes them
    once; and its bar is reported as progress.
    """
    import gguf

    # no attribute of transformers: its processing_utils puts a fresh `transformers` in place, without submodules
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    kept = [(gguf, name, getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")]
    for module, name, make in kept:
        setattr(module, name, lru_cache(make))
    kept.append((reader, "tqdm", reader.tqdm))
    reader.tqdm = lambda items, **_: telling(items)
    try:
        yield
    finally:
        for module, name, make in kept:
            setattr(module, name, make)


def named(source: str, header: Header) -> str:
    """Return the name of a model: its file's without the ending, or the one that the file states where a blob has none
    of its own.
    """
    name = Path(source).name
    if header.path.suffix == ".gguf":
        return header.path.stem
    return str(header.fields.get("general.name") or name) if name.startswith("sha256") else name


def origin(header: Header) -> dict[str, Any]:
    """Return what records say of a model from a file: its type, and a rule of splitting text that was not to be had."""
    rule = header.fields.get("tokenizer.ggml.pre")
    found = {"format": "GGUF", "stored": header.kind}
    if header.fields.get("tokenizer.ggml.model") not in _BYTE_LEVEL or rule in (None, *_AS_GPT2):
        return found
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping

        known = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS
    except (ImportError, AttributeError):  # a transformers that has one rule for all files
        known = {}
    return found if rule in known else {**found, "text": f"split by GPT-2's rule, for {rule!r} is not known here"}


def dequantised() -> dict[str, Any]:
    """Return the options by which transformers dequantises every weight, if it could leave them packed."""
    import transformers

    config: Any = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def finish(hf: Any, header: Header, missing: set[str]) -> None:
    """Check that every weight of the file is in the model and every weight of the model is from the file, and scale
    the rotary frequencies by the factors of the file.

    Raises:
        Refused: weights that are left out or made up, or factors without a place.
    """
    what = f"model {str(header.path)!r}"
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise Refused(what, f"the file has no weights for {len(missing)} places of the model ({some})", _ORIGINAL)
    held = {id(t): t.numel() for t in (*hf.parameters(), *hf.state_dict(keep_vars=True).values())}
    stored = sum(t.numel for t in header.tensors if not t.name.startswith("rope_f"))
    if stored != sum(held.values()):
        why = f"the file has {stored:,} weights and transformers takes {sum(held.values()):,} into the model"
        raise Refused(what, f"{why}: what its architecture has beside them would be left out", _ORIGINAL)
    if any(t.name.startswith("rope_factors") for t in header.tensors):
        raise Refused(what, "transformers does not read the factors of its rotary embeddings (LongRoPE)", _ORIGINAL)
    rotary = [m for m in hf.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
    width = header.of("rope.dimension_count")
    if width and any(2 * m.inv_freq.numel() != width for m in rotary):
        why = f"transformers gives its rotary embeddings another width than {width}"
        raise Refused(what, why, _ORIGINAL)
    if any(t.name == _FREQUENCIES for t in header.tensors):
        _divide(rotary, torch.from_numpy(header.values(_FREQUENCIES)), what)
    hf.hf_quantizer, hf.is_quantized = None, False  # nothing is quantised any more: it may be saved and moved
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config
    hf.config.name_or_path = str(header.path)


def unreadable(header: Header, error: Exception) -> Refused:
    """Return the refusal of a file that transformers could not read."""
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
    unknown = isinstance(error, KeyError) or "not supported" in said or "nknown gguf" in said
    why = (
        f"transformers reads no {header.architecture!r} models from GGUF" if unknown else "transformers cannot read it"
    )
    return Refused(f"model {str(header.path)!r}", f"{why}: {said}", _ORIGINAL)


def _divide(rotary: list[Any], factors: torch.Tensor, what: str) -> None:
    """Divide the rotary frequencies by one factor each, as llama.cpp does."""
    if not rotary or any(m.inv_freq.shape != factors.shape for m in rotary):
        raise Refused(what, "its factors of rotary frequencies fit nowhere in the model", _ORIGINAL)
    for m in rotary:
        scaled = m.inv_freq / factors.to(m.inv_freq)
        m.inv_freq, m.original_inv_freq = scaled, scaled.clone()


def _starts(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(len(MAGIC)) == MAGIC


def _fetched(source: str, repository: str, name: str, revision: str | None) -> Path:
    """Return a file of the hub, fetched unless it is in its cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except Exception as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        why, way = f"there is no such file, and it could not be fetched: {said}", "check the name and the network"
        raise Refused(f"model {source!r}", why, way) from error


def _pulled(source: str, name: str, tag: str) -> Path:
    """Return the file of a model that Ollama has pulled."""
    place = name if name.count("/") > 1 else f"registry.ollama.ai/{name if '/' in name else f'library/{name}'}"
    for store in OLLAMA:
        manifest = store.expanduser() / "manifests" / place / tag
        if manifest.is_file() and (file := _of_manifest(manifest)) is not None:
            return file
    where = " and ".join(map(str, OLLAMA))
    way = f"ollama pull {source.removeprefix('ollama:')}, or give the path of its manifest or blob"
    raise Refused(f"model {source!r}", f"Ollama has no such model in {where}", way)


def _of_manifest(path: Path) -> Path | None:
    """Return the blob of weights that a manifest of Ollama names, if the file is one."""
    if path.stat().st_size > 1 << 20:
        return None
    try:
        layers = json.loads(path.read_text("utf-8"))["layers"]
        digest = next(x["digest"] for x in layers if x["mediaType"] == "application/vnd.ollama.image.model")
    except (ValueError, KeyError, TypeError, StopIteration):
        return None
    store = next((p.parent for p in path.absolute().parents if p.name == "manifests"), None)
    blob = store / "blobs" / digest.replace(":", "-") if store is not None else None
    if blob is None or not blob.is_file():
        what, why = f"model {str(path)!r}", f"it is a manifest of Ollama, and its blob {digest} is not beside it"
        raise Refused(what, why, "pull the model again, or give the blob itself")
    return blob
