"""Several processes: what `torchrun --nproc-per-node N -m cutaway …` needs around a command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def is_main_process() -> bool:
    """Return True if this process prints and saves: the only one, or the first that torchrun started."""
    return not _several() or os.environ["RANK"] == "0"


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def joined() -> Iterator[None]:
    """Join the process group that torchrun describes, if any."""
    if not _several():
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
