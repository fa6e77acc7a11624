"""Weights that accelerate keeps on the CPU or on disk until their module runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def offloaded(module: nn.Module) -> bool:
    """Return True if weights of the module are fetched by accelerate's hook when it runs."""
    return hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters())


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Within the block, the module's weights are in it."""
    if not offloaded(module):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield
