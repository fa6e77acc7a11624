"""Nodes and edges: the points of a computational graph and the lines between them, in string forms that round-trip.

`z.9.6` (an address) · `latent.3.1024@5` (latent 1024 of a dictionary's block 3, at position 5) · `error.3@5` (what that
block's dictionary misses) · `logit.262@-1` (of token 262) · `z.9.6→q_in.10.0` (an edge; `->` is read too) ·
`base:z.9.6` (of the model called base, where there are several).
"""

from __future__ import annotations

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
class Logit:
    """The logit of one token of the vocabulary."""

    token: int
    position: int | None = None
    model: str = ""

    def __str__(self) -> str:
        return written(["logit", str(self.token)], self.position, self.model)


Node = Address | Latent | Error | Logit
_FORMS: dict[str, tuple[type[Latent] | type[Error] | type[Logit], int]] = {
    "latent": (Latent, 2),
    "error": (Error, 1),
    "logit": (Logit, 1),
}


@dataclass(frozen=True)
class Edge:
    """A direct connection: what `source` writes, as `target` reads it."""

    source: Node
    target: Node

    def __str__(self) -> str:
        return f"{self.source}{ARROW}{self.target}"


def parse_node(text: str | Node) -> Node:
    """Read a node: an address, a latent, an error or a logit.

    Raises:
        Refused: none of these forms, or an index that is missing, surplus or not a whole number.
    """
    if not isinstance(text, str):
        return text
    model, body = split_model(text)
    body, at, where = body.partition("@")
    name, *indices = body.split(".")
    if name not in _FORMS:
        return parse(text)
    kind, arity = _FORMS[name]
    if len(indices) != arity:
        form = ".".join([name, *["BLOCK", "INDEX"][:arity]]) if name != "logit" else "logit.TOKEN"
        raise Refused(f"node {text!r}", f"{len(indices)} indices were given where the form is {form}", f"write {form}")
    numbers = [_whole(i, text) for i in indices]
    if min(numbers) < 0:
        raise Refused(f"node {text!r}", "an index is negative", "count from 0")
    return kind(*numbers, position=_whole(where, text) if at else None, model=model)


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
        case Latent(block=block) | Error(block=block):
            return block
    return None


def _whole(text: str, node: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Refused(
            f"node {node!r}", f"{text!r} is not a whole number", "write for example latent.3.1024@5"
        ) from None
