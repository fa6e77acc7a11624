"""Commands that repeat `explain`, `harvest` and the commands of dictionaries, which are not methods."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from cyclopts import Parameter

from cutaway import zoo
from cutaway.core.repeat import words

if TYPE_CHECKING:
    from cutaway.models.model import Model

#: flags whose texts may be paths
_PLACES = ("file", "model", "text", "other", "seeds", "labels", "words", "choice", "store", "source", "dictionary")


def repeated(name: str, function: Callable[..., Any], given: Mapping[str, Any], *leave: str) -> str:
    """Write the command line of a function with these values: relative paths made whole, defaults left out.

    Flags that say where the outcome is written (the group "Output", and those named in `leave`) are left out too.
    """
    first, out = list[str](), ["cutaway", *name.split()]
    for flag, value, usual, positional in _values(function, given):
        if flag in leave:
            continue
        placed = _placed(flag, value)
        if positional:
            first += [] if value is None else [str(placed)]
        elif value != usual:
            out += words(flag, placed)
    if any(w.startswith("-") for w in first):
        return shlex.join([*out, "--", *first])
    at = 1 + len(name.split())
    return shlex.join([*out[:at], *first, *out[at:]])


def pinned(model: Model, name: str) -> str:
    """Return the name that a model was asked for by, as it means the same from everywhere and for good."""
    return name if model.made is None else str(model.made.flags[""])


def _values(function: Callable[..., Any], given: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, bool]]:
    """Yield each flag's name, value and default, and True if it is positional; groups of flags one by one."""
    hints = get_type_hints(function, include_extras=True)
    for p in inspect.signature(function).parameters.values():
        value = given[p.name]
        if is_dataclass(value):
            for f in fields(value):
                usual = f.default if f.default is not MISSING else None
                yield f.name, getattr(value, f.name), usual, False
        elif not any("Output" in m.group for m in _marks(hints[p.name])):
            yield p.name, value, None if p.default is p.empty else p.default, p.kind is p.POSITIONAL_ONLY


def _marks(hint: Any) -> list[Any]:
    return [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Parameter)]


def _placed(flag: str, value: Any) -> Any:
    """Return a value with whole paths where it names what lies here, also as `NAME=PLACE` or `PLACE?choices`."""
    if isinstance(value, list | tuple):
        return [_placed(flag, v) for v in value]
    if isinstance(value, Path):
        return str(value.absolute())
    loose = flag == "choice" and not str(value).endswith(".safetensors")
    if not isinstance(value, str) or flag not in _PLACES or loose or zoo.find(value.rpartition("=")[2]) is not None:
        return value
    for start in (0, value.find("=") + 1):
        for end in dict.fromkeys((len(value), value.find("?") % (len(value) + 1))):  # without one, the end once more
            place = Path(value[start:end]).expanduser()
            if value[start:end].strip() and place.exists():
                return f"{value[:start]}{place.absolute()}{value[end:]}"
    return value
