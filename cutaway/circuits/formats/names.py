"""Edges under the names of other tools, each end read by itself.

| tool | writers | readers |
|---|---|---|
| EAP-IG, MIB | `input`, `a7.h3`, `m4` | `a9.h6<q>`, `m5`, `logits` |
| AutoCircuit | `Resid Start`, `A7.3`, `MLP 4` | `A9.6.Q`, `MLP 5`, `Resid End` |
| ACDC, TransformerLens | `models.anatomy.foreign_names.EDGE_SOURCES` | `EDGE_TARGETS` |

Keys and values are those of each head there (`Circuit.per_head`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cutaway.core.address import Address
from cutaway.core.node import ARROW, Edge
from cutaway.core.refuse import Refused
from cutaway.models.anatomy.foreign_names import EDGE_SOURCES, EDGE_TARGETS

# Forms with the site that each is; of branches the end of its name, behind the letter.
_WRITERS = (
    (r"input|Resid Start", "embed"),
    (r"(?:a(?P<layer>\d+)\.h|A(?P<level>\d+)\.)(?P<head>\d+)", "z"),
    (r"(?:m|MLP )(?P<layer>\d+)", "mlp_out"),
    *EDGE_SOURCES,
)
_READERS = (
    (r"logits|Resid End", "logits"),
    (r"a(?P<layer>\d+)\.h(?P<head>\d+)<(?P<letter>[qkv])>", "_in"),
    (r"A(?P<layer>\d+)\.(?P<head>\d+)\.(?P<letter>[QKV])", "_in"),
    (r"(?:m|MLP )(?P<layer>\d+)", "mlp_in"),
    *EDGE_TARGETS,
)


def read_edge(name: str) -> Edge:
    """Read an edge by the name that another tool gives it, both ends with an arrow between.

    Raises:
        Refused: an end that is none of the forms.
    """
    ends = [e.strip() for e in name.replace("->", ARROW).split(ARROW)]
    if len(ends) != 2:
        raise Refused(f"edge {name!r}", f"it has {len(ends)} ends, not two", "write a7.h3->a9.h6<q>")
    return Edge(_read(ends[0], _WRITERS), _read(ends[1], _READERS))


def _read(text: str, forms: Sequence[tuple[str, str]]) -> Address:
    for form, site in forms:
        if found := re.fullmatch(form, text):
            part = {"layer": None, "level": None, "head": None, "letter": "", **found.groupdict()}
            layer, head = part["layer"] or part["level"], part["head"]
            name = f"{part['letter'].lower()}_in" if site == "_in" else site
            return Address(name, None if layer is None else int(layer), None if head is None else int(head))
    why = "no tool that is read here names one so"
    raise Refused(f"end {text!r} of an edge", why, "write a7.h3, m4, input or a9.h6<q>")


def known(name: str) -> bool:
    """Return True if a name is one of the forms of another tool."""
    try:
        read_edge(name)
    except Refused:
        return False
    return True


def mib_writer(u: Address) -> str:
    """Return a writer's name in EAP-IG and MIB."""
    return "input" if u.layer is None else f"a{u.layer}.h{u.unit}" if u.site == "z" else f"m{u.layer}"


def mib_readers(v: Address, heads_per_group: int = 1) -> list[str]:
    """Return a reader's names in EAP-IG and MIB: of keys and values those of all heads of the group."""
    if v.layer is None:
        return ["logits"]
    if v.site == "mlp_in":
        return [f"m{v.layer}"]
    size, unit = heads_per_group if v.site != "q_in" else 1, v.unit or 0
    return [f"a{v.layer}.h{h}<{v.site[0]}>" for h in range(unit * size, (unit + 1) * size)]
