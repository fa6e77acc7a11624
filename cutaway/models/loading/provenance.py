"""Record of how a model was loaded and of its state since, from which commands that load it again are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cutaway.core.repeat import Made, called
from cutaway.models.access import taps
from cutaway.models.loading import identity

if TYPE_CHECKING:
    from cutaway.models.model import Model

_FLAGS = ("dtype", "device", "attention")
_OBJECTS = ("tokenizer", "world")


def loaded(model: Model, source: str, given: Mapping[str, Any]) -> Made:
    """Return the recipe of a model made by `load(source, …)`; options left at their defaults do not count."""
    given = {n: _plain(v) for n, v in given.items() if v not in (None, "", True)}
    objects = [n for n in given if n in _OBJECTS]
    told = {n: v for n, v in given.items() if n not in _OBJECTS}
    only_python = [n for n, v in told.items() if n not in _FLAGS or not isinstance(v, str)]
    why = f"the model was loaded with an object as its {' and '.join(objects)}" if objects else ""
    no_flags = why or (f"no flag says {only_python[0]}={told[only_python[0]]!r}" if only_python else "")
    flags = {"": source} | {n: told[n] for n in _FLAGS if n in told}
    return Made(called("ca.load", repr(source), **told), flags, no_flags, why).of(model, look)


def pinned(model: Model, source: str) -> str:
    """Return an absolute name of a source: a whole path, or a commit of the hub."""
    at = Path(source).expanduser()
    if at.exists():
        return str(at.absolute())
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = source.partition("@")
    if name.count("/") != 1:
        return source
    file = "adapter_config.json" if identity.ORIGINS.get(model.hf, {}).get("format") == "PEFT" else "config.json"
    there = try_to_load_from_cache(name, file, revision=revision or None)  # in a folder that is named by its commit
    return f"{name}@{Path(there).parent.name}" if isinstance(there, str) else source


def look(model: Model) -> dict[str, Any]:
    """Return the state that numbers depend on, by aspect, in a form that is quickly compared."""
    hf = model.hf
    held = {n: t for n, t in identity.tensors(hf).items() if isinstance(t, Tensor)}
    return {
        "dtype": [t.dtype for t in held.values()],
        "device": [t.device for t in held.values()],
        "weights": weights(model),
        "modules, settings or hooks": identity.described(hf)[0],
        "open edits": taps.busy(model.anatomy),
        "tokenizer": (id(model.tokenizer), len(model.tokenizer) if model.tokenizer is not None else 0),
        "world": id(model.world),
        "autocast": any(torch.is_autocast_enabled(d) for d in ("cpu", "cuda")),
    }


def weights(model: Model) -> list[tuple[str, Any, int]]:
    """Return the memory of every weight, and how often each was written to."""
    held = {n: t for n, t in identity.tensors(model.hf).items() if isinstance(t, Tensor)}
    return [(n, *_held(t)) for n, t in held.items()]


def restored(model: Model, before: list[tuple[str, Any, int]], written: set[int]) -> None:
    """Keep the recipe of a model some of whose weights were written to and have their bytes of `before` again.

    Args:
        model: the model.
        before: its `weights` from then.
        written: addresses of the memory that was written to; the recipe is lost if other weights changed too.
    """
    made, now, held = model.made, weights(model), identity.tensors(model.hf)
    own = {n for n, t in held.items() if isinstance(t, Tensor) and t.untyped_storage().data_ptr() in written}
    others = [[w for w in part if w[0] not in own] for part in (before, now)]
    if made is not None and made.seen.get("weights") == before and others[0] == others[1]:
        model.made = replace(made, seen={**made.seen, "weights": now})


def _held(t: Tensor) -> tuple[Any, int]:
    """Return the memory of a tensor, known even when it is given to another one, and how often it was written to."""
    local: Tensor = t.to_local() if hasattr(t, "to_local") else t  # type: ignore[operator]
    version = -1 if local.is_inference() else local._version
    if local.is_meta:  # weights that are elsewhere come and go
        return None, 0
    try:
        return StorageWeakRef(local.untyped_storage()), version
    except RuntimeError:  # a quantised tensor has no storage of its own
        return id(t), version


def _plain(value: Any) -> Any:
    """Return an option's value in words that repeat it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, torch.device) else value
