"""Sharing of a plan over processes: each takes its share of the jobs, and all end with all results.

Started by `torchrun --nproc-per-node N cutaway …`; without a process group there is one process and nothing to do.
Every process holds the whole model and does the clean run itself; only numbers travel. A model that is itself split
over the processes (tensor parallelism) is run by all of them together, so its plans are not shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
_SPLIT = ("q", "k", "v", "scores", "pattern", "z", "head_out", "mlp_pre", "mlp_gate", "mlp_post", "router")


def processes() -> int:
    """Return the number of processes that share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if processes() > 1 else 0


def split(hf: nn.Module) -> bool:
    """Return True if tensor parallelism has split weights of the model over processes."""
    if processes() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in hf.parameters())


def split_sites(hf: nn.Module) -> dict[str, str]:
    """Return the sites of which each process holds a part only, with the reason why they cannot be read or edited."""
    reason = f"tensor parallelism splits its heads or neurons over {processes()} processes: load without it, or place"
    return dict.fromkeys(_SPLIT, reason + " the model with device='auto'") if split(hf) else {}


def mine(jobs: Sequence[T], cost: Callable[[T], float]) -> list[T]:
    """Return the jobs of this rank: greedy, largest cost first, to the least-loaded rank."""
    n = processes()
    load, shares = [0.0] * n, [list[T]() for _ in range(n)]
    for job in sorted(jobs, key=cost, reverse=True):
        least = load.index(min(load))
        shares[least].append(job)
        load[least] += cost(job)
    kept = {id(j) for j in shares[rank()]}
    return [j for j in jobs if id(j) in kept]


def others(spent: float, device: torch.device) -> float:
    """Sum the spending of all other processes."""
    total = torch.tensor(spent, dtype=torch.float64).to(device if device.type != "mps" else "cpu")
    dist.all_reduce(total)
    return float(total) - spent


def gathered(values: Tensor | None, device: torch.device, shared: bool = True) -> Tensor:
    """Return the sum over processes, each of which filled its own entries and left zeros elsewhere (None: it had no
    share); without `shared`, what this process has.
    """
    if shared and processes() > 1:
        shapes: list[tuple[int, ...] | None] = [None] * processes()
        dist.all_gather_object(shapes, tuple(values.shape) if values is not None else None)
        shape = next(s for s in shapes if s is not None)
        values = values.to(device) if values is not None else torch.zeros(shape, device=device)
        dist.all_reduce(values)
    assert values is not None
    return values.to(device)
