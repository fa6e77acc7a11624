"""Files of other tools that hold a vector per layer; one module per form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cutaway.core.address import Address
from cutaway.directions.formats import repeng, steering_vectors


@dataclass(frozen=True)
class Format:
    """A form of files.

    Attributes:
        read: returns the vectors of a file by address, and the family of the model, empty if the file does not say it.
        write: writes vectors by address, of a model of some family.
    """

    read: Callable[[Path], tuple[dict[str, Tensor], str]]
    write: Callable[[Mapping[Address, Tensor], Path, str], Path]


#: each form by the ending of its files
FORMATS = {".gguf": Format(repeng.read, repeng.write), ".pt": Format(steering_vectors.read, steering_vectors.write)}
