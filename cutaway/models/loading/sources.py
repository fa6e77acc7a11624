"""Checks of sources, dtypes and devices before loading, and the progress of loading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cutaway.core.progress import advance
from cutaway.core.refuse import Keyword, Refused, nearest

DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")


def check_dtype(dtype: Any) -> None:
    """Refuse what no model computes in.

    Raises:
        Refused: another dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        close = nearest(name, DTYPES, 1)
        whole = "weights in whole numbers are quantised, and no model is computed in them" if "int" in name else ""
        why = whole or "no model is computed in that" + (f"; did you mean {close}?" if close else "")
        raise Refused(Keyword("dtype", name, of="model"), why, f"use one of {', '.join(DTYPES)}")


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        Refused: no such kind of device, none on this machine, or fewer of them.
    """
    try:
        wanted = torch.device(device)
        kind = torch.get_device_module(wanted.type) if wanted.type != "meta" else None
    except RuntimeError as error:
        near = nearest(device, ("cpu", "cuda", "mps", "auto", "tensor_parallel"), 1)
        why = f"it is no device{f'; did you mean {near}?' if near else ''}"
        raise Refused(Keyword("device", device, of="model"), why, "use cpu, cuda, cuda:0, mps or auto") from error
    if kind is None or wanted.type == "cpu":
        return
    count = kind.device_count() if kind.is_available() else 0
    if count <= (wanted.index or 0):
        there = f"this machine has {count} of them: {wanted.type}:0 to {wanted.type}:{count - 1}"
        why = there if count else f"this machine has no {wanted.type} device that PyTorch can use"
        raise Refused(Keyword("device", device, of="model"), why, "use cpu" if not count else f"use {wanted.type}:0")


@contextmanager
def own_progress(reports: bool = True) -> Iterator[None]:
    """Within the block, loading reports to `core.progress`, and transformers draws no bar of its own; nor does it print
    which weights it left out unless `reports`.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    if not reports:
        logging.set_verbosity_error()
    try:
        with _own_bar(getattr(logging, "set_tqdm_hook", None)):
            yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _own_bar(hook: Any) -> Iterator[None]:
    if hook is None:  # transformers before it could be asked
        yield
        return

    def told(make: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("desc") == "Loading weights" and args:
            return telling(args[0])
        return before(make, args, options) if before is not None else make(*args, **options)

    before: Any = hook(told)
    try:
        yield
    finally:
        hook(before)


def telling(items: Any) -> Iterator[Any]:
    """Yield the items and report each as progress."""
    for n, item in enumerate(items):
        yield item
        advance(n + 1, len(items))
