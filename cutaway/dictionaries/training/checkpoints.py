"""Checkpoints of training runs: safetensors and JSON, written by one process or by several, read by any number.

One process writes `checkpoint.safetensors`, its record in the header. Several write with PyTorch's distributed
checkpoints in their safetensors form (the other form pickles its metadata): every process its own rows, into one of two
folders in turn, and then the first process names the folder in `checkpoint.json`, beside the record. A run that is
killed while it writes leaves the earlier checkpoint as it was. Whoever reads takes the rows it needs, whatever the
number of processes that wrote.
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
from cutaway.dictionaries.training.mesh import Shards, per_latent

KIND = "dictionary training"
ALONE, SHARED, FOLDERS = "checkpoint.safetensors", "checkpoint.json", ("checkpoint-a", "checkpoint-b")


def exists(out: Path, shards: Shards | None = None) -> bool:
    """Whether a folder holds a checkpoint, as the first process sees it."""
    here = any((out / name).is_file() for name in (ALONE, SHARED))
    return here if shards is None else shards.told(here)


def write(out: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any], shards: Shards | None = None) -> None:
    """Write the state of a run: with `shards`, of which every process holds its own rows."""
    if shards is None:
        write_tensors(out / ALONE, tensors, {"kind": KIND, "run": record})
        _forget(out, ALONE)
        return
    folder = out / shards.told(_free(out))
    if shards.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    shards.wait()
    _save({n: _spread(n, t.detach(), shards) for n, t in tensors.items()}, folder)
    shards.wait()
    if shards.rank == 0:
        write_json(out / SHARED, {"kind": KIND, "folder": folder.name, "run": record})
        _forget(out, folder.name)
    shards.wait()


def read(out: Path, shards: Shards | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the last checkpoint, of which a shard gets its own rows, and the record.

    Raises:
        Refused: the folder holds no checkpoint of a training run.
    """
    newest = max((out / n for n in (ALONE, SHARED)), key=lambda p: p.stat().st_mtime if p.is_file() else 0)
    name = newest.name if shards is None else shards.told(newest.name)
    if name == ALONE:
        tensors, header = read_tensors(out / ALONE)
        if shards is not None:
            tensors = {n: _own(n, t, shards) for n, t in tensors.items()}
    else:
        header = read_json(out / SHARED)
        header = header if isinstance(header, dict) else {}
        known = header.get("kind") == KIND and header.get("folder") in FOLDERS
        tensors = _load(out / header["folder"], shards) if known else {}
    if header.get("kind") != KIND or not isinstance(header.get("run"), dict) or not tensors:
        raise Refused(f"file {out / name}", "it is no checkpoint of a training run", "use another folder")
    return tensors, header["run"]


def _free(out: Path) -> str:
    """The folder that the checkpoint there is does not use."""
    used = read_json(out / SHARED).get("folder") if (out / SHARED).is_file() else None
    return next(f for f in FOLDERS if f != used)


def _forget(out: Path, but: str) -> None:
    """Delete earlier checkpoints."""
    if but == ALONE:
        (out / SHARED).unlink(missing_ok=True)
    else:
        (out / ALONE).unlink(missing_ok=True)
    for folder in FOLDERS:
        if folder != but and (out / folder).is_dir():
            shutil.rmtree(out / folder, ignore_errors=True)


def _row_wise(name: str, t: Tensor) -> bool:
    """Whether a tensor of a checkpoint, such as `0/weight/encoder.0`, has one row a latent."""
    _, kind, own = name.split("/", 2)
    return kind in ("weight", "buffer", "first", "second") and per_latent(own, t)


def _own(name: str, t: Tensor, shards: Shards) -> Tensor:
    start, end = shards.bounds(len(t)) if t.ndim else (0, 0)
    return t[start:end].clone() if _row_wise(name, t) else t


def _spread(name: str, t: Tensor, shards: Shards) -> Any:
    """A tensor as distributed checkpoints take it: rows of a larger one, or held by all."""
    if not _row_wise(name, t):
        return t
    rows = torch.tensor(len(t), device=shards.device)
    return _placed(t, int(shards.summed(rows, "latent")), shards)


def _placed(t: Tensor, n: int, shards: Shards) -> Any:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = torch.empty(n, *t.shape[1:], device="meta")
    return DTensor.from_local(
        t.contiguous(), shards.mesh, [Replicate(), Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _save(state: dict[str, Any], folder: Path) -> None:
    storage = shared_storage()
    storage.save(state, storage_writer=storage.HuggingFaceStorageWriter(str(folder), save_distributed=True))


def _load(folder: Path, shards: Shards | None) -> dict[str, Tensor]:
    storage = shared_storage()
    reader = storage.HuggingFaceStorageReader(str(folder))
    state: dict[str, Any] = {}
    for name, meta in reader.read_metadata().state_dict_metadata.items():
        whole = torch.empty(meta.size, dtype=meta.properties.dtype, device="meta")
        if shards is None or not _row_wise(name, whole):
            state[name] = torch.empty_like(whole, device="cpu" if shards is None else shards.device)
        else:
            start, end = shards.bounds(len(whole))
            state[name] = _placed(torch.empty_like(whole[start:end], device=shards.device), len(whole), shards)
    with warnings.catch_warnings():  # it says that there is one process only, which is known
        warnings.simplefilter("ignore", UserWarning)
        storage.load(state, storage_reader=reader, no_dist=shards is None)
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
