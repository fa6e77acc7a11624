"""Places that a method visits one by one: positions that all prompts share, and components named in a text."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.core.stats import matched_random
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

LAYERS = "as many heads of each layer, as many MLPs"
_FORM = "components are written as layer.head or mlp_out.layer, separated by commas"


def positions(tokens: Tokens) -> list[int]:
    """From the front if all prompts are equally long, else from the end, as far as the shortest goes."""
    shortest = tokens.shortest
    return list(range(shortest)) if not tokens.uneven else list(range(-shortest, 0))


def all_components(model: Model, mlps: bool = True) -> list[Address]:
    """Return every head, and with `mlps` every MLP, in order of depth.

    Raises:
        Refused: the model has none.
    """
    heads = model.places("z.*.*")
    return sorted([*heads, *(model.places("mlp_out") if mlps else [])], key=lambda a: (a.layer, a.site != "z", a.unit))


def components(model: Model, names: Sequence[str], least: int = 1) -> list[Address]:
    """Return the heads and MLPs of these names, each once: `3.1,5.2,mlp_out.4`, or all heads of a layer as `3.*`.

    Raises:
        Refused: another form, no such component, or fewer than `least`.
    """
    found = model.places([f"z.{n}" if n[:1].isdigit() else n for n in names])
    whole = all(a.position is None and (a.site, a.unit is None) in (("z", False), ("mlp_out", True)) for a in found)
    if not whole or len(found) < least:
        least_of = f", at least {least} of them" if least > 1 else ""
        raise Refused(f"components {','.join(names)!r}", _FORM + least_of, "write for example 3.1,5.2")
    return found


def random_sets(
    pool: Sequence[Address], chosen: Sequence[Address], samples: int, seed: int
) -> tuple[list[list[Address]], str]:
    """Random sets of others as large as `chosen`, and how they are matched to it.

    As many heads of each layer and as many MLPs, where enough others are left; else as many heads and MLPs of any
    layer; else as many of either.

    Raises:
        Refused: fewer are left than were chosen.
    """
    index = {a: i for i, a in enumerate(pool)}
    ways: list[tuple[str, list[Hashable]]] = [
        (LAYERS, [(a.site, a.layer if a.unit is not None else "any layer") for a in pool]),
        ("as many heads and MLPs, of any layer", [a.site for a in pool]),
        ("as many components, of any kind and layer", [0] * len(pool)),
    ]
    says, groups = next((way for way in ways if _enough(way[1], [index[a] for a in chosen])), ways[-1])
    drawn = matched_random([index[a] for a in chosen], len(pool), groups=groups, seed=seed, samples=samples)
    return [[pool[i] for i in d] for d in drawn], says


class RandomSets(NamedTuple):
    """Random sets of other heads, if enough are left.

    Attributes:
        sets: the sets; none if `why` says so.
        matched: how they are matched to the chosen heads.
        why: why there are none; "" otherwise.
    """

    sets: list[list[Address]]
    matched: str
    why: str


def random_heads(pool: Sequence[Address], chosen: Sequence[Address], samples: int, seed: int) -> RandomSets:
    """Return random sets of other heads as `random_sets` draws them, or why there are none."""
    try:
        return RandomSets(*random_sets(pool, chosen, samples, seed), "")
    except Refused as refusal:
        return RandomSets([], "", f"too many heads for random sets: {refusal.why}")


def _enough(groups: Sequence[Hashable], chosen: Sequence[int]) -> bool:
    """Return True if every group has as many others as chosen ones."""
    wanted = [groups[i] for i in chosen]
    return all(2 * wanted.count(g) <= groups.count(g) for g in set(wanted))
