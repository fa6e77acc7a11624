"""Recipes of how dictionaries were opened, from which records say how to open them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cutaway.core.repeat import Made, called
from cutaway.dictionaries.parts import Parts, described

P = TypeVar("P", bound=Parts)

NARROW = "the command line computes with the dictionary in float32"


def loaded(d: P, name: str, format: str | None, choices: Mapping[str, Any]) -> P:
    """Return the dictionary that `load(name, format, …)` found, with how it was found."""
    name = str(Path(name).expanduser().absolute()) if Path(name).expanduser().exists() else name
    tensors = [n for n, v in choices.items() if isinstance(v, Tensor | dict)]
    why = f"the dictionary was opened with tensors as its {' and '.join(tensors)}" if tensors else ""
    said = {n: json.dumps(v) if not isinstance(v, str) else v for n, v in choices.items() if n not in tensors}
    said |= {} if format is None else {"format": format}
    odd = [n for n, v in said.items() if "&" in v]
    no_flags = why or (f"no flag says {odd[0]}={said[odd[0]]!r}" if odd else "")
    query = "&".join(f"{n}={v}" for n, v in said.items())
    flags = {"": f"{name}?{query}" if query else name}
    return _with(d, Made(called("ca.dictionaries.load", repr(name), format=format, **choices), flags, no_flags, why))


def opened(d: P, path: str | Path, dtype: torch.dtype | None) -> P:
    """Return the dictionary that `open(path)` read, with how it was read."""
    whole = str(Path(path).expanduser().absolute())
    more = [] if dtype is None else [str(dtype)]
    return _with(d, Made(called("ca.dictionaries.open", repr(whole), *more), {"": whole}))


def moved(d: P, before: P, device: Any, dtype: torch.dtype | None) -> P:
    """Return the dictionary after `before.to(device, dtype)`, with how it was made."""
    how = before.made
    if how is None or look(before) != how.seen:
        return replace(d, made=None)
    if look(d) == how.seen:
        return d
    step = f".to({None if device is None else str(device)!r}, {dtype})"
    return _with(d, replace(how.then(step), no_flags="" if how.no_flags == NARROW else how.no_flags))


def look(d: Parts) -> dict[str, Any]:
    """Return the state that a dictionary's numbers depend on, in a form that is quickly compared."""
    tensors, header = described(d)
    held = [(n, t.dtype, StorageWeakRef(t.untyped_storage()), t._version) for n, t in tensors.items()]
    return {"weights": held, "settings": json.dumps({n: v for n, v in header.items() if n != "about"})}


def _with(d: P, how: Made) -> P:
    if d.dtype != torch.promote_types(d.dtype, torch.float32) and not how.no_flags:
        how = replace(how, no_flags=NARROW)
    return replace(d, made=how.of(d, look))
