"""The dictionaries of a harvest: their names, and what a store says about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary


def named(dictionaries: Dictionary | Mapping[str, Dictionary] | Sequence[Dictionary]) -> dict[str, Dictionary]:
    """Return dictionaries by name: the given ones, else the sites that each reads and writes.

    Raises:
        Refused: none, two of one name, or a gate under which a token's code depends on other tokens of the batch.
    """
    if isinstance(dictionaries, Mapping):
        out = dict(dictionaries)
    else:
        each = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
        names = [_sites(d) for d in each]
        out = {n if names.count(n) == 1 else f"{n} {i}": d for i, (n, d) in enumerate(zip(names, each, strict=True), 1)}
    if not out:
        raise Refused("features of no dictionary", "there is nothing to harvest", "give at least one")
    for name, d in out.items():
        if any(g.whole_batch for g in d.gates):
            why = "its gate chooses among all tokens of a batch, so that a token's code depends on the others"
            raise Refused(f"features of {name}", why, "use a dictionary with thresholds")
    return out


def described(name: str, d: Dictionary) -> dict[str, Any]:
    """Return the entry of a dictionary in the manifest, without its files."""
    own, made = d.identity(), d.made
    opened = None if made is None or made.no_flags else made.flags.get("")
    return own | {"name": name, "source": own["name"], "opened": opened}


def _sites(d: Dictionary) -> str:
    reads, writes = (s[0] if len(s) == 1 else f"{s[0]}…{s[-1]}" for s in (d.reads, d.writes))
    return reads if reads == writes else f"{reads}>{writes}"
