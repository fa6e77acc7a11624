"""The dictionaries of a harvest: their names, and what a store says about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.opening import open_dictionary

if TYPE_CHECKING:
    from cutaway.features.store.feature_store import FeatureStore


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


def dictionary_of(store: FeatureStore, name: str | None, source: str | None = None) -> Dictionary:
    """Open a dictionary of a store, by the words of the harvest where others are not given.

    Raises:
        Refused: the harvest does not say how.
    """
    word = source if source is not None else store.latents(name).row["opened"]
    if word is None:
        raise Refused("the dictionary of the store", "the harvest does not say how it is opened", "give --source FILE")
    return open_dictionary(str(word))


def _sites(d: Dictionary) -> str:
    reads, writes = (s[0] if len(s) == 1 else f"{s[0]}…{s[-1]}" for s in (d.reads, d.writes))
    return reads if reads == writes else f"{reads}>{writes}"
