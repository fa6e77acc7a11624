"""Directions in files: opened, written, and named on the command line; the subject `direction`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cutaway.core.refuse import Refused
from cutaway.core.repeat import Made, called
from cutaway.core.result import open_result
from cutaway.core.stats import generator
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.directions.direction import Direction, direction
from cutaway.directions.formats import FORMATS
from cutaway.directions.found import FoundDirections
from cutaway.directions.selected import SelectedDirection


def open_direction(
    path: str | Path, finder: str | None = None, reading: str | None = None, addresses: str | None = None
) -> Direction:
    """Open a direction of a file.

    That is a file of `Direction.save`, a control vector of repeng (.gguf), a vector of steering-vectors (.pt), or what
    `directions.find` or `directions.select` saved.

    Args:
        path: the file.
        finder: of what `directions.find` saved: the finder; None means the first.
        reading: of such a file, too: the reading; None means the first. Of what `directions.select` saved: the
            position.
        addresses: the addresses that are kept, with commas between them; None means all.

    Raises:
        Refused: no such file, another kind of file, no such finder, reading or address, or vectors that cannot be a
            direction.
    """
    path = Path(path).expanduser()
    found = open_result(path) if path.suffix not in FORMATS else _foreign(path)
    named = [a.strip() for a in addresses.split(",")] if addresses else []
    if isinstance(found, FoundDirections):
        found = found.direction(finder, reading, *named)
    elif isinstance(found, SelectedDirection):
        found = found.at(reading, *named)
    elif not isinstance(found, Direction):
        raise Refused(f"file {str(path)!r}", f"it holds a {found.kind}", "give the file of a direction")
    elif finder or reading:
        raise Refused(f"file {str(path)!r}", "it holds one direction", "leave finder and reading out")
    elif named:
        found = found.select(address=named)
    whole = str(path.absolute())
    options = {"finder": finder, "reading": reading, "addresses": addresses}
    made = Made(called("ca.directions.open", repr(whole), **options), {"": whole, **options})
    return replace(found, made=made.of(found, Direction.identity))


def _foreign(path: Path) -> Direction:
    vectors, family = FORMATS[path.suffix].read(path)
    return direction(vectors, path.stem, family=family)


def write_direction(found: Direction, path: str | Path) -> Path:
    """Write a direction as its ending says: .safetensors, or .gguf and .pt for repeng and steering-vectors.

    The forms of others hold the vectors of one site, by layer, and nothing else.

    Raises:
        Refused: another ending, or addresses that the form has no place for.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return found.save(path)
    if path.suffix not in FORMATS:
        raise Refused(f"file {str(path)!r}", "no form of directions ends so", "use .safetensors, .gguf or .pt")
    return FORMATS[path.suffix].write(dict(zip(found.places, found.vector, strict=True)), path, found.family)


def _example(opened: Mapping[str, Any]) -> Direction:
    """Return directions drawn at random at the ends of two blocks."""
    g, width = generator(7), opened["model"].shape.d_model
    return direction({f"resid_post.{i}": torch.randn(width, generator=g) for i in range(2)}, "drawn")


register(
    Subject(
        "direction",
        Direction,
        (
            Flag(
                "direction",
                str,
                REQUIRED,
                "a saved direction, what `directions find` or `select` saved, .gguf (repeng), .pt",
            ),
            Flag("direction_finder", str | None, None, "of what `directions find` saved: the finder"),
            Flag(
                "direction_reading", str | None, None, "of the same: mean or last; of `directions select`: the position"
            ),
            Flag("direction_addresses", str | None, None, "the addresses that are kept"),
        ),
        lambda flags, opened: open_direction(*flags.values()),
        _example,
        needs=("model",),
        advice="ca.directions.open(file)",
    )
)
