"""Records: what was computed, on what, by which versions, at what counted cost."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from cutaway.core.files import tensor_bytes

_HASHED_WHOLE = 1 << 26  # parameters of up to 64 Mi bytes are hashed whole, larger ones by an even sample
_SAMPLE = 1 << 14


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


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and values; tensors beyond 64 MiB enter by an even sample of their values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        if t.is_meta:
            continue
        if t.numel() * t.element_size() > _HASHED_WHOLE:
            t = t.detach().reshape(-1)[:: max(1, t.numel() // _SAMPLE)]
        digest.update(tensor_bytes(t))
    return digest.hexdigest()[:16]


def hash_text(*texts: str) -> str:
    """SHA-256 of texts, for data."""
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:16]


@cache
def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("cutaway", "torch", "transformers", "tokenizers", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """The machine, as far as timings and roundings depend on it."""
    return {"system": platform.system(), "processor": platform.machine(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}  # fmt: skip
