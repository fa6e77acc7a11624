"""Control vectors of repeng and llama.cpp: GGUF files of the architecture `controlvector`.

The tensor `direction.N` is added to what block N leaves (`resid_post.N`, counted from 0). llama.cpp has no place for
block 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models.loading.gguf_header import read_header

ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.(\d+)")


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the vectors of a file by address, and the family of the model.

    Raises:
        Refused: a damaged file, a GGUF file of something else, or no package `gguf`.
    """
    _check_package(path)
    header = read_header(path)
    layers = {t.name: found[1] for t in header.tensors if (found := _NAME.fullmatch(t.name)) is not None}
    if header.architecture != ARCHITECTURE or not layers:
        why = f"its architecture is {header.architecture!r}, with {len(layers)} tensors direction.N"
        raise Refused(f"file {str(path)!r}", why, "give a control vector, as repeng exports them")
    named = {f"resid_post.{n}": torch.from_numpy(header.values(name)) for name, n in layers.items()}
    hint = str(header.of("model_hint") or "")
    return dict(sorted(named.items(), key=lambda item: int(item[0].rpartition(".")[2]))), hint


def write(vectors: Mapping[Address, Tensor], path: Path, family: str) -> Path:
    """Write vectors of `resid_post` by layer.

    Raises:
        Refused: another site, block 0, or no package `gguf`.
    """
    _check_package(path)
    from gguf import GGUFWriter

    other = next((a for a in vectors if a.site != "resid_post" or not a.layer or a.unit is not None), None)
    if other is not None:
        why = f"it holds what is added to blocks 1 and later, and there is {other}"
        raise Refused(f"file {str(path)!r}", why, "select addresses resid_post.1 and later, or write .safetensors")
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", family or "unknown")  # repeng reads no file without one
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
    for a, v in vectors.items():
        writer.add_tensor(f"direction.{a.layer}", v.detach().float().cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _check_package(path: Path) -> None:
    if find_spec("gguf") is None:
        why = "GGUF files are read and written with gguf, which is not here"
        raise Refused(f"file {str(path)!r}", why, "pip install 'cutaway[gguf]'")
