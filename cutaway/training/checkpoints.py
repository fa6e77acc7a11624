"""Checkpoints of training runs: safetensors and JSON, written by one process or by several, read by any number.

One process writes `checkpoint.safetensors`, its record in the header. Several write with PyTorch's distributed
checkpoints in their safetensors form (the other form pickles its metadata): each process writes its own rows, into one
of two folders in turn, and then the first process names the folder in `checkpoint.json`, beside the record. A run that
is killed while it writes leaves the earlier checkpoint as it was. A reader takes the rows it needs, whatever the number
of processes that wrote.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.core.files import read_json, read_tensors, write_json, write_tensors
from cutaway.core.refuse import Refused
from cutaway.training.ranks import Ranks

ALONE, SHARED, FOLDERS = "checkpoint.safetensors", "checkpoint.json", ("checkpoint-a", "checkpoint-b")


class Checkpoints:
    """The checkpoint of a training run in its folder, of which the newest is kept.

    Attributes:
        out: folder of the run.
        kind: what is trained, as in "dictionary training"; a checkpoint of another kind is refused.
        ranks: the processes that write and read together; None for one process.
    """

    def __init__(self, out: Path, kind: str, ranks: Ranks | None = None):
        self.out, self.kind, self.ranks = out, kind, ranks

    def exist(self) -> bool:
        """True if the folder holds a checkpoint, as the first process sees it."""
        here = any((self.out / name).is_file() for name in (ALONE, SHARED))
        return here if self.ranks is None else self.ranks.broadcast(here)

    def write(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write the state of a run; each of several processes gives its own rows."""
        out, ranks = self.out, self.ranks
        if ranks is None:
            write_tensors(out / ALONE, tensors, {"kind": self.kind, "run": record})
            _forget(out, ALONE)
            return
        used = read_json(out / SHARED).get("folder") if (out / SHARED).is_file() else None
        folder = out / ranks.broadcast(next(f for f in FOLDERS if f != used))
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        ranks.wait()
        _save({n: _spread(n, t.detach(), ranks) for n, t in tensors.items()}, folder)
        ranks.wait()
        if ranks.rank == 0:
            write_json(out / SHARED, {"kind": self.kind, "folder": folder.name, "run": record})
            _forget(out, folder.name)
        ranks.wait()

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors of the last checkpoint, of which each process gets its own rows, and the record.

        Raises:
            Refused: the folder holds no checkpoint, or one of another kind of run.
        """
        out, ranks = self.out, self.ranks
        newest = max((out / n for n in (ALONE, SHARED)), key=lambda p: p.stat().st_mtime if p.is_file() else 0)
        name = newest.name if ranks is None else ranks.broadcast(newest.name)
        if name == ALONE:
            tensors, header = read_tensors(out / ALONE)
            if ranks is not None:
                tensors = {n: _own(n, t, ranks) for n, t in tensors.items()}
        else:
            header = read_json(out / SHARED)
            header = header if isinstance(header, dict) else {}
            known = header.get("kind") == self.kind and header.get("folder") in FOLDERS
            tensors = _load(out / header["folder"], ranks) if known else {}
        if header.get("kind") != self.kind or not isinstance(header.get("run"), dict) or not tensors:
            raise Refused(f"file {out / name}", f"it is no checkpoint of {self.kind}", "use another folder")
        return tensors, header["run"]


def _forget(out: Path, but: str) -> None:
    """Delete earlier checkpoints."""
    if but == ALONE:
        (out / SHARED).unlink(missing_ok=True)
    else:
        (out / ALONE).unlink(missing_ok=True)
    for folder in FOLDERS:
        if folder != but and (out / folder).is_dir():
            shutil.rmtree(out / folder, ignore_errors=True)


def _own(name: str, t: Tensor, ranks: Ranks) -> Tensor:
    if not ranks.splits(name, t):
        return t
    start, end = ranks.bounds(len(t))
    return t[start:end].clone()


def _spread(name: str, t: Tensor, ranks: Ranks) -> Any:
    """Return a tensor as distributed checkpoints take it: rows of a larger one, or the same in each process."""
    return _placed(t, ranks.number(len(t)), ranks) if ranks.splits(name, t) else t


def _placed(t: Tensor, n: int, ranks: Ranks) -> Any:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = torch.empty(n, *t.shape[1:], device="meta")
    return DTensor.from_local(
        t.contiguous(), ranks.mesh, [Replicate(), Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _save(state: dict[str, Any], folder: Path) -> None:
    storage = shared_storage()
    storage.save(state, storage_writer=storage.HuggingFaceStorageWriter(str(folder), save_distributed=True))


def _load(folder: Path, ranks: Ranks | None) -> dict[str, Tensor]:
    storage = shared_storage()
    reader = storage.HuggingFaceStorageReader(str(folder))
    state: dict[str, Any] = {}
    for name, meta in reader.read_metadata().state_dict_metadata.items():
        whole = torch.empty(meta.size, dtype=meta.properties.dtype, device="meta")
        if ranks is None or not ranks.splits(name, whole):
            state[name] = torch.empty_like(whole, device="cpu" if ranks is None else ranks.device)
        else:
            start, end = ranks.bounds(len(whole))
            state[name] = _placed(torch.empty_like(whole[start:end], device=ranks.device), len(whole), ranks)
    with warnings.catch_warnings():  # it says that there is one process only, which is known
        warnings.simplefilter("ignore", UserWarning)
        storage.load(state, storage_reader=reader, no_dist=ranks is None)
    return {n: t.to_local() if hasattr(t, "to_local") else t for n, t in state.items()}


def shared_storage() -> Any:
    """PyTorch's distributed checkpoints, imported where several processes write or their checkpoint is read.

    Raises:
        Refused: this PyTorch knows no safetensors form of them.
    """
    import torch.distributed.checkpoint as storage

    if not hasattr(storage, "HuggingFaceStorageWriter"):
        why = f"PyTorch {torch.__version__} writes distributed checkpoints as pickles only"
        raise Refused("a checkpoint of several processes", why, "update PyTorch, or train in one process")
    return storage
