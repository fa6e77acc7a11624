"""Parts of a long computation other than a sweep of edits, kept within `resuming`: what is done goes to shards.

Each part is a tensor that depends on its inputs and on what the whole computation is about alone. The folder of a
computation is named by a hash of the latter; a part is found again by a hash of its inputs. Files of another
computation are refused, never mixed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from cutaway.core.content import content
from cutaway.core.files import read_tensors, write_tensors
from cutaway.core.refuse import Keyword, Refused
from cutaway.models.dry import planned
from cutaway.models.sweep.cache import ledger_folder

_EVERY = 20.0  # seconds between two shards
_BYTES = 1 << 26  # that wait at most to be written


class Parts:
    """Parts made so far; without a folder none are kept.

    Attributes:
        folder: where the shards lie, or None.
        key: the computation that they are of.
    """

    def __init__(self, folder: Path | None = None, key: str = ""):
        self.folder, self.key = folder, key
        self._waiting: dict[str, Tensor] = {}
        self._written = time.monotonic()
        self._where = dict[str, Path]()
        for path in [] if folder is None else sorted(folder.glob("*.safetensors")):
            tensors, header = read_tensors(path)
            if header.get("parts") != key:
                why = "it belongs to another computation: other model, prompts or options"
                raise Refused(Keyword("resume", str(path)), why, "give another folder")
            self._where |= dict.fromkeys(tensors, path)

    @classmethod
    def open(cls, name: str, key: Callable[[], str]) -> Parts:
        """Open the parts of a computation in the folder of `resuming`, if there is one and numbers are not made up."""
        folder = ledger_folder()
        if folder is None or planned() is not None:
            return cls()
        made = key()
        return cls(folder / f"{name}-{made}", made)

    def made(self, inputs: Any, make: Callable[[], Tensor]) -> Tensor:
        """Return the part of some inputs: from its file, or made now."""
        if self.folder is None:
            return make()
        name = content(inputs)
        if name in self._where:
            return read_tensors(self._where[name])[0][name]
        self._waiting[name] = part = make()
        waiting = sum(t.numel() * t.element_size() for t in self._waiting.values())
        if waiting > _BYTES or time.monotonic() - self._written > _EVERY:
            self.write()
        return part

    def write(self) -> None:
        """Write what waits as a shard."""
        if self.folder is None or not self._waiting:
            return
        path = self.folder / f"{len(list(self.folder.glob('*.safetensors'))):05d}.safetensors"
        write_tensors(path, self._waiting, {"kind": "parts", "parts": self.key})
        self._where |= dict.fromkeys(self._waiting, path)
        self._waiting, self._written = {}, time.monotonic()
