"""Hashes of whole values: keys under which results are stored, so any two different values get different hashes.

Every tensor counts with all its bytes, however deep it lies; a function with its code and what it has closed over; an
object by its own `fingerprint` or `identity`, if it has one, or as what its `known_as` returns. Classes and functions
that have moved keep the names of `core.key_names`. Nothing is taken from the `repr` of a container, which shortens, and
nothing is passed over: a value that cannot be read is refused.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutaway.core.files import tensor_bytes
from cutaway.core.key_names import KEY_FIELDS, KEY_NAMES, LATER_FIELDS, UNKEYED_FIELDS
from cutaway.core.record import versions
from cutaway.core.refuse import Refused

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    PurePath,
    torch.dtype,
    torch.device,
    np.generic,
)


def content(value: Any) -> str:
    """Return the SHA-256 of a value with everything in it; the same in every process.

    Functions of libraries whose versions the record names count by name, others by their code and the globals it uses.

    Raises:
        Refused: something whose value cannot be read.
    """
    return _Walk().of(value)[:16]


def _joined(kind: str, *parts: str | bytes | memoryview) -> str:
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()


class _Walk:
    """Walk through a value that reads each object once.

    Attributes:
        known: hash of each object seen so far, by its id.
        held: those objects, held so that an id cannot come to mean another object.
    """

    def __init__(self) -> None:
        self.known: dict[int, str] = {}
        self.held: list[Any] = []  # so that no number in `known` comes to stand for another object

    def of(self, x: Any) -> str:
        """Return the hash of one value."""
        if isinstance(x, _PLAIN) and not isinstance(x, Enum):
            return _joined(_name(type(x)), x if isinstance(x, (str, bytes)) else repr(x))
        if id(x) not in self.known:
            self.held.append(x)
            self.known[id(x)] = f"part {len(self.held)} again"  # what holds itself
            self.known[id(x)] = self._read(x)
        return self.known[id(x)]

    def _read(self, x: Any) -> str:
        kind = _name(type(x))
        if isinstance(x, Tensor):
            return _joined(kind, str(tuple(x.shape)), str(x.dtype), bytes(0) if x.is_meta else tensor_bytes(x))
        if isinstance(x, np.ndarray):
            return _joined(kind, str(x.shape), str(x.dtype), x.tobytes() if x.dtype != object else self._each(x.flat))
        if isinstance(x, Enum):
            return _joined(kind, x.name)
        if isinstance(x, torch.Generator):
            return _joined(kind, self.of(x.get_state()))
        if isinstance(x, (list, tuple)):
            return _joined(kind, *map(self.of, x))
        if isinstance(x, (set, frozenset)):
            return _joined(kind, *sorted(map(self.of, x)))
        if (code := self._code_of(x)) is not None:
            return code
        if isinstance(x, Mapping):
            items = _joined("items", *sorted(self.of(k) + self.of(v) for k, v in x.items()))
            return _joined(kind, items, "" if type(x) is dict else self.of(getattr(x, "__dict__", None)))
        return self._object(x, kind)

    def _object(self, x: Any, kind: str) -> str:
        if callable(within := getattr(x, "known_as", None)) and (inner := within()) is not None:
            return self.of(inner)
        for name in ("fingerprint", "identity"):
            if callable(known := getattr(x, name, None)):
                return _joined(kind, self.of(known()))
        if is_dataclass(x):
            return _joined(kind, *(name + self.of(value) for name, value in _parts(x, kind)))
        if not hasattr(x, "__dict__"):
            what = f"a value of type {kind}"
            raise Refused(what, "nothing tells it apart from others of its type", "use numbers, texts and tensors")
        return _joined(kind, self.of(vars(x)))

    def _code_of(self, x: Any) -> str | None:
        """Return a function, method, class or module; None for what is none of these."""
        if isinstance(x, (type, ModuleType)):
            return _joined("named", _name(x))
        if isinstance(x, BuiltinFunctionType):
            bound = x.__self__ if not isinstance(x.__self__, ModuleType | None) else None
            return _joined("builtin", _name(x), self.of(bound))
        if isinstance(x, MethodType):
            return _joined("method", self.of(x.__func__), self.of(x.__self__))
        if isinstance(x, partial):
            return _joined("partial", *map(self.of, (x.func, x.args, x.keywords)))
        if isinstance(x, CodeType):
            return _joined("code", x.co_code, self._each(x.co_consts), *x.co_names)
        return self._function(x) if isinstance(x, FunctionType) else None

    def _function(self, f: FunctionType) -> str:
        # A name and the versions tell functions of these packages apart.
        by_version = frozenset(versions()) | sys.stdlib_module_names | {"builtins"}
        known = (f.__module__ or "").split(".")[0] in by_version
        inner: Any = inspect.unwrap(f) if known else f
        cells = [c.cell_contents for c in inner.__closure__ or () if _filled(c)]
        given = [inner.__defaults__, inner.__kwdefaults__]
        parts = [_name(f), self._each(cells), self._each(given)]
        if not known:
            used = {n: f.__globals__[n] for n in sorted(_names(f.__code__)) if n in f.__globals__}
            parts += [self.of(f.__code__), *(n + self._global(v) for n, v in used.items())]
        return _joined("function", *parts)

    def _global(self, x: Any) -> str:
        try:
            return self.of(x)
        except Refused:  # such as a lock: what a function's module holds need not be what the function returns
            return _name(type(x))

    def _each(self, items: Iterable[Any]) -> str:
        return _joined("each", *map(self.of, items))


def _parts(x: Any, kind: str) -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass as keys know them."""
    renamed, later = KEY_FIELDS.get(kind, {}), LATER_FIELDS.get(kind, ())
    for f in fields(x):
        value = getattr(x, f.name)
        if f.name not in UNKEYED_FIELDS.get(kind, ()) and (f.name not in later or value != f.default):
            yield renamed.get(f.name, f.name), value


def _names(code: CodeType) -> set[str]:
    """Return the names that a function's code may take from its module."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _name(x: Callable[..., Any] | type | ModuleType) -> str:
    path = f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', getattr(x, '__name__', ''))}"
    return KEY_NAMES.get(path, path)
