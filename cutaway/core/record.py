"""Records: what was computed, on what, by which versions, at what counted cost."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from cutaway.core.files import tensor_bytes

_SMALL = 1 << 16  # bytes; hashing this little costs no more than finding out if it has changed
_KEPT: dict[int, tuple[ref[Tensor], tuple[Any, ...], Tensor, str]] = {}  # by id: tensor, stamp, sample, its hash


@dataclass
class Cost:
    """Work really done, in units of one prompt through the whole model once."""

    forwards: float = 0.0
    backwards: float = 0.0
    seconds: float = 0.0
    events: list[str] = field(default_factory=list)


_COSTS: ContextVar[tuple[Cost, ...]] = ContextVar("cutaway_costs", default=())


@contextmanager
def counting() -> Iterator[Cost]:
    """Count the forwards and backwards done inside; counters nest, and each sees everything inside it."""
    cost, start = Cost(), time.perf_counter()
    token = _COSTS.set((*_COSTS.get(), cost))
    try:
        yield cost
    finally:
        _COSTS.reset(token)
        cost.seconds = time.perf_counter() - start


def count(forwards: float = 0.0, backwards: float = 0.0) -> None:
    """Add work to every open counter."""
    for cost in _COSTS.get():
        cost.forwards += forwards
        cost.backwards += backwards


def note(text: str) -> None:
    """Tell every open counter what a reader of the result must know about how its prompts were read."""
    for cost in _COSTS.get():
        if text not in cost.events:
            cost.events.append(text)


def hash_tensors(tensors: Mapping[str, Tensor], fresh: bool = False) -> str:
    """Return the SHA-256 of names, shapes, dtypes and every byte of the values; unchanged tensors are not read again.

    A change shows in the tensor's storage and version counter and, since writing through `.data` moves neither, in a
    sample of every row and every column. So only a write through `.data` to part of a row and part of a column can be
    missed. With `fresh`, every byte is read again; use it where the hash decides whether stored numbers are reused.
    """
    digest, made = hashlib.sha256(), dict[int, str]()
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        if not t.is_meta:
            value = made.get(id(t)) or _hash(t, fresh)  # tied weights have several names
            made[id(t)] = value
            digest.update(value.encode())
    return digest.hexdigest()[:16]


def _hash(t: Tensor, fresh: bool) -> str:
    if t.numel() * t.element_size() <= _SMALL or t.is_quantized or t.layout is not torch.strided:
        return hashlib.sha256(tensor_bytes(t)).hexdigest()
    stamp, seen, kept = (t.data_ptr(), t._version, t.shape, t.dtype, t.stride()), _sample(t), _KEPT.get(id(t))
    if kept is not None and not fresh and kept[0]() is t and kept[1] == stamp and torch.equal(kept[2], seen):
        return kept[3]
    value, i = hashlib.sha256(tensor_bytes(t)).hexdigest(), id(t)
    _KEPT[i] = ref(t, lambda _: _KEPT.pop(i, None)), stamp, seen, value
    return value


def _sample(t: Tensor) -> Tensor:
    """Return some of a tensor's numbers, of every row and every column, as bits."""
    flat = t.detach().resolve_conj().resolve_neg().reshape(-1)
    picked = flat.index_select(0, _met(t.numel() // t.shape[-1], t.shape[-1], t.device)) if t.ndim > 1 else flat.clone()
    return picked.view(torch.uint8)


@lru_cache(64)
def _met(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the places in a matrix laid out row by row, such that every row and every column is met."""
    i = torch.arange(max(rows, columns), device=device)
    step = next(p for p in (7919, 7927, 7933) if columns % p)
    return i % rows * columns + i * step % columns


def hash_text(*texts: str) -> str:
    """Return the SHA-256 of texts, for data."""
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:16]


@cache
def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("cutaway", "torch", "transformers", "tokenizers", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Return the machine, as far as timings and roundings depend on it."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
