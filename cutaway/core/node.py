"""Nodes and edges: the points of a computational graph and the lines between them, in string forms that round-trip.

`z.9.6` (an address) · `latent.3.1024@5` (latent 1024 of a dictionary's block 3, at position 5) · `error.3@5` (what that
block's dictionary misses) · `others.3@5` (the units of its MLP that a graph leaves out) · `bias.attn_out.3` (constants
that a site adds) · `logit.262@-1` (of token 262) · `logit.262-113@-1` (of token 262 less that of token 113) ·
`direction.truth@-1` (of the last stream) · `z.9.6→q_in.10.0` (an edge; `->` is read too) · `base:z.9.6` (of the model
called base, where there are several).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cutaway.core.address import Address, parse, split_model, written
from cutaway.core.refuse import Refused

ARROW = "→"
_ASCII = "->"


@dataclass(frozen=True, order=True)
class Latent:
    """A latent of a dictionary.

    Attributes:
        block: The dictionary's block (the layer whose stream or MLP it reads, in a dictionary of every layer).
        index: The latent within its block.
        position: A position of the prompt, negative from its last real token; None means all of them.
        model: The model, where there are several.
    """

    block: int
    index: int
    position: int | None = None
    model: str = ""

    def __str__(self) -> str:
        return written(["latent", str(self.block), str(self.index)], self.position, self.model)


@dataclass(frozen=True, order=True)
class Error:
    """The part of an activation that a dictionary's block does not reconstruct."""

    block: int
    position: int | None = None
    model: str = ""

    def __str__(self) -> str:
        return written(["error", str(self.block)], self.position, self.model)


@dataclass(frozen=True, order=True)
class Others:
    """The units of one layer's MLP that a graph leaves out, all together."""

    block: int
    position: int | None = None
    model: str = ""

    def __str__(self) -> str:
        return written(["others", str(self.block)], self.position, self.model)


@dataclass(frozen=True, order=True)
class Bias:
    """Constants that `site` of a layer adds to the stream, or with no site those with which a reader reads it.

    Attributes:
        site: the site, such as attn_out; empty for the readers' own constants.
        layer: its layer; None without a site.
        model: The model, where there are several.
    """

    site: str = ""
    layer: int | None = None
    model: str = ""

    def __str__(self) -> str:
        return written(["bias", *([self.site, str(self.layer)] if self.site else [])], None, self.model)

    @property
    def position(self) -> None:
        """No position: constants are the same everywhere."""
        return


@dataclass(frozen=True, order=True)
class Logit:
    """The logit of one token of the vocabulary, or with a foil its logit less that of another token."""

    token: int
    position: int | None = None
    model: str = ""
    foil: int | None = None

    def __str__(self) -> str:
        name = str(self.token) if self.foil is None else f"{self.token}-{self.foil}"
        return written(["logit", name], self.position, self.model)


@dataclass(frozen=True, order=True)
class Direction:
    """A direction of the last residual stream, by a name of letters, digits, hyphens and underscores."""

    name: str
    position: int | None = None
    model: str = ""

    def __str__(self) -> str:
        return written(["direction", self.name], self.position, self.model)


Node = Address | Latent | Error | Others | Bias | Logit | Direction
_FORMS: dict[str, tuple[type[Latent] | type[Error] | type[Others], int]] = {
    "latent": (Latent, 2),
    "error": (Error, 1),
    "others": (Others, 1),
}
_NAMED = ("logit", "direction")


@dataclass(frozen=True)
class Edge:
    """A direct connection: what `source` writes, as `target` reads it."""

    source: Node
    target: Node

    def __str__(self) -> str:
        return f"{self.source}{ARROW}{self.target}"


def parse_node(text: str | Node) -> Node:
    """Read a node: an address, a latent, an error, other units, a bias, a logit or a direction.

    Raises:
        Refused: none of these forms, or an index that is missing, surplus or not a whole number.
    """
    if not isinstance(text, str):
        return text
    model, body = split_model(text)
    body, at, where = body.partition("@")
    name, *indices = body.split(".")
    position = _whole(where, text) if at and name in (*_FORMS, *_NAMED) else None
    if name in _FORMS:
        kind, arity = _FORMS[name]
        form = ".".join([name, *["BLOCK", "INDEX"][:arity]])
        return kind(*_counts(indices, arity, form, text), position=position, model=model)
    match name:
        case "logit":
            tokens = re.split(r"(?<=\d)-", indices[0], maxsplit=1) if len(indices) == 1 else []
            token, *foil = _counts(tokens or indices, len(tokens) or 1, "logit.TOKEN", text)
            return Logit(token, position, model, *foil)
        case "bias":
            return _bias(indices, bool(at), text, model)
        case "direction":
            if len(indices) != 1 or not re.fullmatch(r"[\w-]+", indices[0]):
                raise Refused(
                    f"node {text!r}", "a direction has one name, of letters and digits", "write direction.NAME"
                )
            return Direction(indices[0], position, model)
    return parse(text)


def _counts(indices: Sequence[str], arity: int, form: str, text: str) -> list[int]:
    """Return as many whole numbers from 0 on as a node has indices."""
    if len(indices) != arity:
        raise Refused(f"node {text!r}", f"{len(indices)} indices were given where the form is {form}", f"write {form}")
    numbers = [_whole(i, text) for i in indices]
    if min(numbers) < 0:
        raise Refused(f"node {text!r}", "an index is negative", "count from 0")
    return numbers


def _bias(indices: Sequence[str], at: bool, text: str, model: str) -> Bias:
    """Return the bias of a site's layer, or of the readers."""
    if at:
        raise Refused(f"node {text!r}", "constants have no position", "leave out the @")
    if not indices:
        return Bias(model=model)
    address = parse(".".join(indices))
    if address.layer is None or address.unit is not None:
        raise Refused(f"node {text!r}", "constants are those of one layer's site", "write bias.attn_out.3")
    return Bias(address.site, address.layer, model)


def parse_edge(text: str | Edge | Sequence[str | Node]) -> Edge:
    """Read an edge: `source→target` (or `source->target`), or a pair of nodes.

    Raises:
        Refused: not exactly two nodes, or an end that cannot be read as one.
    """
    if isinstance(text, Edge):
        return text
    ends = text.replace(_ASCII, ARROW).split(ARROW) if isinstance(text, str) else list(text)
    if len(ends) != 2:
        raise Refused(f"edge {text!r}", f"it has {len(ends)} ends, not two", f"write z.9.6{ARROW}q_in.10.0")
    source, target = (parse_node(e.strip() if isinstance(e, str) else e) for e in ends)
    return Edge(source, target)


def layer_of(node: Node) -> int | None:
    """Return the layer (or dictionary block) that a node belongs to, None if it belongs to the whole model."""
    match node:
        case Address(layer=layer):
            return layer
        case Latent(block=block) | Error(block=block) | Others(block=block):
            return block
        case Bias(layer=layer):
            return layer
    return None


def _whole(text: str, node: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Refused(
            f"node {node!r}", f"{text!r} is not a whole number", "write for example latent.3.1024@5"
        ) from None
