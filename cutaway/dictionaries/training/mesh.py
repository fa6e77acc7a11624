"""Processes that train one dictionary together: a mesh of replicas × shards of latents, and what they exchange.

Every process holds a contiguous shard of the latents of every block and, if there are replicas, a part of the tokens of
every batch. What a step exchanges: the candidates' values of gates that choose a number (their exact global choice
follows from them), the partial reconstructions, the gradients of what all hold (b_dec, skips), a few sums; and over
replicas all gradients. Sums stand in the forward pass alone: where a loss reads a completed sum, each process knows the
gradient of its own part already, so backward passes exchange nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import pad

from cutaway.core.refuse import Refused
from cutaway.dictionaries.kernels.reduce import Across

PER_LATENT = ("encoder", "decoder", "b_enc", "silent", "gate")


def mesh(replicas: int = 1) -> DeviceMesh:
    """Arrange the processes of this run as replicas (parts of the tokens) × shards of latents.

    Every process reads the whole stream and takes its part of each batch: replicas share the training, not the model's
    forwards. Where those cost most, harvest once and train on the shards.

    Raises:
        Refused: no process group, or a number of replicas that does not divide the processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise Refused("a mesh of processes", "there is one process without a group", "start the run with torchrun")
    n = dist.get_world_size()
    if not 1 <= replicas <= n or n % replicas:
        raise Refused(f"{replicas} replicas of {n} processes", "they are not equal", f"let replicas divide {n}")
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return init_device_mesh(kind, (replicas, n // replicas), mesh_dim_names=("data", "latent"))


class LatentShards(Across):
    """This process's place among those that train a dictionary, and the exchanges with them."""

    def __init__(self, over: DeviceMesh):
        if over.mesh_dim_names != ("data", "latent"):
            raise Refused(f"a mesh of {over.mesh_dim_names}", "its sides are not data and latent", "use train.mesh()")
        self.mesh = over
        self.device = torch.device(over.device_type)
        if over.device_type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.replicas, self.count = over.size(0), over.size(1)
        self.replica, self.shard = over.get_local_rank("data"), over.get_local_rank("latent")
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self._groups = {
            "all": (None, self.processes),
            "data": (over.get_group("data"), self.replicas),
            "latent": (over.get_group("latent"), self.count),
        }
        self.here = self.all = 1  # tokens of the batch: this process's, and all

    # --- whose is what

    def bounds(self, n_latents: int) -> tuple[int, int]:
        """Return the first latent held here and the one behind the last: equal shards, the last may be smaller."""
        size = -(-n_latents // self.count)
        return min(n_latents, self.shard * size), min(n_latents, (self.shard + 1) * size)

    def splits(self, name: str, t: Tensor) -> bool:
        """True if a tensor of a checkpoint, such as `0/weight/encoder.0`, has one row per latent."""
        _, kind, own = name.split("/", 2)
        return kind in ("weight", "buffer", "first", "second") and per_latent(own, t)

    def take(self, acts: Mapping[str, Float[Tensor, "token _"]]) -> dict[str, Tensor]:
        """This replica's tokens of a batch.

        Raises:
            Refused: fewer tokens than replicas.
        """
        self.all = len(next(iter(acts.values())))
        if self.all < self.replicas:
            why = f"{self.replicas} replicas share them"
            raise Refused(f"a batch of {self.all} tokens", why, "use larger batches, or fewer replicas")
        mine = {s: x.tensor_split(self.replicas)[self.replica] for s, x in acts.items()}
        self.here = len(next(iter(mine.values())))
        return mine

    @property
    def share(self) -> float:
        """This replica's share of the tokens."""
        return self.here / self.all

    # --- sums that formulas ask for

    def latents(self, part: Tensor) -> Tensor:
        return part if self.count == 1 else _Sum.apply(part, self._groups["latent"][0])  # type: ignore[return-value]

    def tokens(self, mean: Tensor) -> Tensor:
        if self.replicas == 1:
            return mean
        return _Sum.apply(_Scaled.apply(mean, self.share), self._groups["data"][0])  # type: ignore[return-value]

    def number(self, n: int) -> int:
        return int(self.summed(torch.tensor(n, device=self.device), "latent"))

    def highest(self, floor: float) -> float:
        found = torch.tensor(floor, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def largest(self, value: Float[Tensor, "token candidate"], k: int) -> Float[Tensor, "token candidate"]:
        mine = pad(value, (0, k - value.shape[1]))
        every = self._gathered(mine, "latent").transpose(0, 1).reshape(len(value), -1)
        floor = every.topk(k, dim=1).values[:, -1:]
        more, tied = every > floor, every == floor
        room = k - more.sum(1, keepdim=True)
        won = (more | (tied & (tied.cumsum(1) <= room))).unflatten(1, (self.count, k))
        return won[:, self.shard, : value.shape[1]].to(value.dtype)

    def enough(self, found: int, wanted: int) -> bool:
        return sum(self._counts(found)) >= self._of_all(wanted)

    def largest_of_all(self, score: Float[Tensor, "entry"], n: int) -> Int[Tensor, "kept"]:
        """As alone; of equals those of the first processes, tokens and latents are kept."""
        counts, n = self._counts(len(score)), self._of_all(n)
        if sum(counts) <= n:
            return torch.arange(len(score), device=score.device)
        lowest = torch.finfo(score.dtype).min
        mine = pad(score, (0, max(counts) - len(score)), value=lowest)
        every = self._gathered(mine, "all")
        floor = every.reshape(-1).topk(n, sorted=False).values.min()
        more, tied = every > floor, every == floor
        kept = more | (tied & (tied.reshape(-1).cumsum(0).view_as(tied) <= n - more.sum()))
        return kept[self.rank, : len(score)].nonzero()[:, 0]

    # --- other exchanges

    def summed(self, t: Tensor, over: str = "all") -> Tensor:
        """Return the sum over all processes, or over one side of the mesh; without gradient."""
        group, n = self._groups[over]
        if n == 1:
            return t.detach()
        total = t.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    def least(self, t: Tensor) -> Tensor:
        """Return the smallest over all processes."""
        found = t.detach().clone()
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return found

    def whole(self, part: Tensor, n_latents: int) -> Tensor:
        """Return all rows of what the shards hold rows of, on the processor."""
        size = -(-n_latents // self.count)
        mine = torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])
        return self._gathered(mine, "latent").flatten(0, 1)[:n_latents].cpu()

    def broadcast(self, data: Any) -> Any:
        """Return the first process's JSON-ready data."""
        text = torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8).to(self.device)
        size = torch.tensor(len(text), device=self.device)
        dist.broadcast(size, 0)
        if self.rank:
            text = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(text, 0)
        return json.loads(bytes(text.tolist()))

    def wait(self) -> None:
        """Wait for all processes."""
        self.summed(torch.zeros(1, device=self.device))

    def _of_all(self, n: int) -> int:
        """Scale a number of this process's tokens to all tokens of the batch."""
        return n * self.all // self.here

    def _counts(self, n: int) -> list[int]:
        return self._gathered(torch.tensor([n], device=self.device), "all").reshape(-1).tolist()

    def _gathered(self, t: Tensor, over: str) -> Tensor:
        group, n = self._groups[over]
        if n == 1:
            return t[None]
        out = t.new_empty(n * len(t), *t.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.13
        gather(out, t.contiguous(), group=group)
        return out.unflatten(0, (n, len(t)))


def per_latent(name: str, t: Tensor) -> bool:
    """True if a weight or buffer of a learner has one row per latent."""
    return t.ndim > 0 and name.split(".")[0] in PER_LATENT


def flat_sum(tensors: Sequence[Tensor], shards: LatentShards) -> list[Tensor]:
    """Return the tensors summed over all processes in one exchange."""
    total = shards.summed(torch.cat([t.reshape(-1) for t in tensors]))
    parts = total.split([t.numel() for t in tensors])
    return [p.view_as(t) for p, t in zip(parts, tensors, strict=True)]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Scaled(torch.autograd.Function):
    """A factor that the gradient does not see: the loss of a replica has it already."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, share: float) -> Tensor:
        return mean * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
