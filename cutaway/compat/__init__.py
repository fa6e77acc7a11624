"""Façades under which notebooks of TransformerLens, SAELens, circuit-tracer and circuitsvis run unchanged.

Three ways in: `cutaway compat run NOTEBOOK.ipynb`, `%load_ext cutaway.compat` in a notebook's first cell, and `with
compat.imports():` in Python. Every deliberate difference from the other package is a row of `docs/compat.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cutaway.compat.aliases import Aliases

#: what the names of models and dictionaries mean, before anything else is asked: folders, or loaded ones
MODELS: dict[str, Any] = {}


@contextmanager
def imports(models: Mapping[str, Any] | None = None) -> Iterator[Aliases]:
    """Import façades under the other packages' names within the block, and yield the record of what was used.

    Args:
        models: what the names mean that `from_pretrained` is called with: folders, or loaded models.

    Raises:
        Refused: one of the packages itself is imported already.
    """
    before, running = dict(MODELS), Aliases.running()
    aliases = (running or Aliases()).install()
    MODELS.update(models or {})
    try:
        yield aliases
    finally:
        MODELS.clear()
        MODELS.update(before)
        if running is None:
            aliases.remove()


def load_ipython_extension(ipython: Any) -> None:
    """Import façades under the other packages' names from now on: `%load_ext cutaway.compat`."""
    (Aliases.running() or Aliases()).install()


def unload_ipython_extension(ipython: Any) -> None:
    """End this, and say what was used: `%unload_ext cutaway.compat`."""
    if aliases := Aliases.running():
        aliases.remove()
        sys.stdout.write(f"{aliases}\n")
