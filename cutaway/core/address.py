"""Addresses: a site, with layer, head and position, in one string form that round-trips.

`resid_post.3` · `z.9.6` (layer 9, head 6) · `mlp_post.2.17` (layer 2, neuron 17) · `resid_pre.0@-1` (last position)
· `embed@4` · `pattern.*` and `z.3.*` (patterns, expanded by `expand`) · `base:z.9.6` (of the model called base, where
there are several). The form needs no escaping in file names, shells with the asterisk quoted, or URLs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from cutaway.core.refuse import Code, Refused
from cutaway.core.sites import BY_NAME, Site, site


@dataclass(frozen=True, order=True)
class Address:
    """A place in a forward pass.

    Attributes:
        site: name of the site.
        layer: the layer; None for all layers, or at a site that the model has once.
        unit: index along the site's head, neuron, expert or channel axis; None for all of them.
        position: position in each prompt, on either padding side; −1 is its last real token; None for all.
        model: name of the model where there are several, else empty.
    """

    site: str
    layer: int | None = None
    unit: int | None = None
    position: int | None = None
    model: str = ""

    def __post_init__(self) -> None:
        # Addresses are keys everywhere: their hash is computed once.
        object.__setattr__(self, "_hash", hash((self.site, self.layer, self.unit, self.position, self.model)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[type[Address], tuple[str, int | None, int | None, int | None, str]]:
        # Hashes of text differ between processes.
        return Address, (self.site, self.layer, self.unit, self.position, self.model)

    def __str__(self) -> str:
        parts = [self.site, *(str(n) for n in (self.layer, self.unit) if n is not None)]
        return written(parts, self.position, self.model)

    @property
    def row(self) -> Site:
        """The site's row in the table."""
        return site(self.site)

    @property
    def place(self) -> Address:
        """The same site and layer, without unit and position: what a tap is attached to."""
        return self if self.unit is None and self.position is None else Address(self.site, self.layer, model=self.model)

    def at(self, position: int) -> Address:
        """Return the same address at one position."""
        return replace(self, position=position)


Pattern = str | Address  # one address, or a text that means several: z, resid_pre.*@-1

UNIT_AXES = ("head", "kv_head", "neuron", "expert", "channel", "ssm_head")


def parse(text: str | Address) -> Address:
    """Return the address written as `text`.

    Raises:
        Refused: unknown site, a missing or surplus index, or an asterisk (those go through `expand`).
    """
    return text if isinstance(text, Address) else _parsed(text)


@lru_cache(maxsize=1 << 16)
def _parsed(text: str) -> Address:
    model, body = split_model(text)
    name, indices, position = _split(body)
    if "*" in indices:
        raise Refused(
            f"address {text!r}", "it is a pattern, and one address is needed", "name one layer, or capture it"
        )
    row = site(name)
    numbers = [_integer(i, text) for i in indices]
    least, most = _arity(row)
    if not least <= len(numbers) <= most:
        form = name + (".LAYER" if row.scope == "layer" else "") + ("[.UNIT]" if most > least else "")
        raise Refused(
            f"address {text!r}", f"{len(numbers)} indices were given where the form is {form}", f"write {example(row)}"
        )
    if position is not None and not row.has_position:
        raise Refused(f"address {text!r}", f"{name} has no position axis (its axes are {row.axes})", "leave out the @")
    layer = numbers[0] if row.scope == "layer" else None
    unit = numbers[least] if len(numbers) > least else None
    return Address(name, layer, unit, position, model)


def listed(patterns: Iterable[Pattern]) -> str:
    """Write patterns as the one text with commas that an option takes."""
    return ",".join(map(str, patterns))


def written(parts: list[str], position: int | None, model: str) -> str:
    """Write a node: the model, the dotted parts and the position, as far as they are given."""
    return (f"{model}:" if model else "") + ".".join(parts) + (f"@{position}" if position is not None else "")


def split_model(text: str) -> tuple[str, str]:
    """Split `base:z.9.6` into the model's name (empty if none is given) and the rest.

    Raises:
        Refused: an empty name before the colon.
    """
    name, colon, rest = text.rpartition(":")
    if colon and not (name and _plain(name)):
        raise Refused(
            f"address {text!r}", f"{name!r} before the colon is not a model's name", "write for example base:z.9.6"
        )
    return name, rest


def _plain(name: str) -> bool:
    return not set(name) & set(":@→*,>") and name == name.strip()


def expand(patterns: str | Address | Iterable[str | Address], sizes: Mapping[str, int]) -> list[Address]:
    """Return all addresses meant by one or several patterns, in the order given, without repetition.

    A site without a layer means every layer; `*` means every layer or unit. `sizes` gives `layer` and the number of
    units on each of `UNIT_AXES`.

    Raises:
        Refused: unknown site, or an index outside the model.
    """
    items = [patterns] if isinstance(patterns, str | Address) else list(patterns)
    if len(items) == 1:
        return list(_expand_one(items[0], tuple(sizes.items())))
    known = tuple(sizes.items())
    return list(dict.fromkeys(address for item in items for address in _expand_one(item, known)))


def example(row: Site) -> str:
    """Return a well-formed address of a site, for messages."""
    return row.name + (".0" if row.scope == "layer" else "")


def unit_axis(row: Site) -> str | None:
    """Return the axis that an address's unit selects, or None."""
    return next((a for a in row.axes.split() if a in UNIT_AXES), None)


def component_axis(row: Site) -> str | None:
    """Return the axis whose entries are components, visited one by one: heads, neurons or experts; or None."""
    axis = unit_axis(row)
    return None if axis in ("channel", "ssm_head") else axis


@lru_cache(maxsize=4096)
def _expand_one(item: str | Address, known: tuple[tuple[str, int], ...]) -> tuple[Address, ...]:
    sizes = dict(known)
    named, body = split_model(str(item))
    if named:
        raise Refused(f"address {str(item)!r}", f"it names the model {named!r}, and this is one model", f"write {body}")
    name, indices, position = _split(body)
    row = site(name)
    least, most = _arity(row)
    if least == 1 and not indices:
        indices = ["*"]
    if len(indices) > most:
        parse(str(item).replace("*", "0"))  # raises with the right words
    layers = _numbers("layer", indices[0], sizes, item) if least else [None]
    units = _numbers(str(unit_axis(row)), indices[least], sizes, item) if len(indices) > least else [None]
    if position is not None and not row.has_position:
        parse(f"{example(row)}@{position}")
    return tuple(Address(name, i, u, position) for i in layers for u in units)


def _numbers(axis: str, index: str, sizes: Mapping[str, int], item: str | Address) -> list[int | None]:
    size = sizes.get(axis, 0)
    if not size:
        raise Refused(f"address {str(item)!r}", f"this model has no {axis}", ("see ", Code("model.sites()")))
    if index == "*":
        return list(range(size))
    n = _integer(index, str(item))
    if not 0 <= n < size:
        raise Refused(f"address {str(item)!r}", f"{axis} {n} is outside this model", f"use 0 to {size - 1}")
    return [n]


def _arity(row: Site) -> tuple[int, int]:
    least = 1 if row.scope == "layer" else 0
    return least, least + (unit_axis(row) is not None)


def _split(text: str) -> tuple[str, list[str], int | None]:
    body, at, where = text.partition("@")
    position = _integer(where, text) if at else None
    parts = body.split(".")
    for n in range(len(parts), 0, -1):
        if (name := ".".join(parts[:n])) in BY_NAME:
            return name, parts[n:], position
    site(parts[0])  # raises with the nearest names
    raise AssertionError("unreachable")


def _integer(text: str, whole: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Refused(
            f"address {whole!r}", f"{text!r} is not a whole number", "write for example z.9.6 or resid_pre.3@-1"
        ) from None
