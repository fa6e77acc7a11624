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
from cutaway.directions.steering import ConditionalSteering, Steering
from cutaway.directions.threshold import Threshold
from cutaway.models.edits.conditional import Condition


def open_direction(
    path: str | Path,
    finder: str | None = None,
    reading: str | None = None,
    addresses: str | None = None,
    dictionary: str | None = None,
    condition: str | None = None,
    device: torch.device | str = "cpu",
) -> Steering:
    """Open a direction of a file, or steering of another kind.

    That is a file of `Direction.save`, a control vector of repeng (.gguf), a vector of steering-vectors (.pt), what
    `directions.find` or `directions.select` saved, or latents that `features.contrast` found.

    Args:
        path: the file.
        finder: of what `directions.find` saved: the finder; None means the first.
        reading: of such a file, too: the reading; None means the first. Of what `directions.select` saved: the
            position.
        addresses: the addresses that are kept, with commas between them; None means all.
        dictionary: of latents: the words that open their dictionary; None means where it was.
        condition: what `directions.threshold` saved, at one address: only prompts above its threshold are steered.
        device: where a dictionary is put.

    Raises:
        Refused: no such file, another kind of file, no such finder, reading or address, vectors that cannot be a
            direction, or another dictionary.
    """
    whole = str(Path(path).expanduser().absolute())
    found = _of_file(Path(whole), finder, reading, addresses).opened(dictionary, device)
    options = {"finder": finder, "reading": reading, "addresses": addresses, "dictionary": dictionary}
    if condition is not None:
        options["condition"] = str(Path(condition).expanduser().absolute())
        found = ConditionalSteering(found, _condition(Path(options["condition"])))
    made = Made(called("ca.directions.open", repr(whole), **options), {"": whole, **options})
    return replace(found, made=made.of(found, type(found).identity))  # type: ignore[type-var]


def _of_file(path: Path, finder: str | None, reading: str | None, addresses: str | None) -> Steering:
    found: Any = open_result(path) if path.suffix not in FORMATS else _foreign(path)
    named = [a.strip() for a in addresses.split(",")] if addresses else []
    if isinstance(found, FoundDirections):
        return found.direction(finder, reading, *named)
    if isinstance(found, SelectedDirection):
        return found.at(reading, *named)
    if not isinstance(found, Steering):
        own = getattr(found, "direction", None)
        if own is None:
            raise Refused(f"file {str(path)!r}", f"it holds a {found.kind}", "give the file of a direction")
        found = own()
    if finder or reading:
        raise Refused(f"file {str(path)!r}", "it holds one direction", "leave finder and reading out")
    if not named:
        return found
    if not isinstance(found, Direction):
        raise Refused(f"file {str(path)!r}", "it holds latents, which have no addresses", "leave addresses out")
    return found.select(address=named)


def _condition(path: Path) -> Condition:
    found = open_result(path)
    if not isinstance(found, Threshold):
        raise Refused(f"file {str(path)!r}", f"it holds a {found.kind}", "give what `directions threshold` saved")
    return found.condition()


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
        Steering,
        (
            Flag(
                "direction",
                str,
                REQUIRED,
                "a direction: what `directions find` or `select` or `features contrast` saved, .gguf (repeng), .pt",
            ),
            Flag("direction_finder", str | None, None, "of what `directions find` saved: the finder"),
            Flag(
                "direction_reading", str | None, None, "of the same: mean or last; of `directions select`: the position"
            ),
            Flag("direction_addresses", str | None, None, "the addresses that are kept"),
            Flag("direction_dictionary", str | None, None, "of latents: their dictionary, if not where it was"),
            Flag(
                "direction_condition",
                str | None,
                None,
                "what `directions threshold` saved at one address: only prompts above it are steered",
            ),
        ),
        lambda flags, opened: open_direction(*flags.values(), device=opened["model"].device),
        _example,
        needs=("model",),
        advice="ca.directions.open(file)",
    )
)
