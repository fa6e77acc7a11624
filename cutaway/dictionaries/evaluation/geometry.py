"""How do the decoder's directions lie to each other?

`nearest`: the largest cosine of each latent's decoder row with another one of the same sites: of a dictionary per
layer, every layer alone. Rows drawn at random in the same number of dimensions are the null. Latents that write
nothing, and one that is alone at its sites, have cosine 0. Nearly parallel rows are latents that stand for one thing
twice (Sharkey et al. 2022).

Control: random rows of the same number and width. Cost: no forward, and (1 + samples) products of a site's rows with
each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.method import method
from cutaway.core.record import machine, versions
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.reconstruction import over_units
from cutaway.dictionaries.evaluation.scores import Score, Scores, collect, control_generator

_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Geometry(Result, kind="dictionary_geometry"):
    """The nearest other latent of every latent, by the cosine of decoder rows."""

    nearest: Float[Tensor, "latent"]
    nearest_null: Float[Tensor, "latent sample"]
    neighbour: Int[Tensor, "latent"]


def decoder_rows(dictionary: Dictionary, site: str | None = None) -> Float[Tensor, "latent d"]:
    """Return the decoder rows of all latents; those of several sites side by side, unless one site is named.

    A latent that does not write a site has zeros there.
    """
    sites = dictionary.writes if site is None else (site,)
    return torch.cat([_rows(dictionary, b, sites) for b in range(len(dictionary.blocks))])


def _rows(dictionary: Dictionary, block: int, sites: Sequence[str]) -> Float[Tensor, "latent d"]:
    n, own = dictionary.blocks[block].n_latents, dictionary.decoder[block]
    none = [torch.zeros(n, dictionary.width(s), device=dictionary.device) for s in sites]
    return torch.cat([own.get(s, z).float() for s, z in zip(sites, none, strict=True)], 1)


@method(
    answers="How do the decoder's directions lie to each other?",
    paper="Sharkey et al. 2022, Taking features out of superposition",
    cost="0",
    control="random_rows",
    rung="observational",
)
def geometry(dictionary: Dictionary, /, *, samples: int = 2, seed: int = 0) -> Geometry:
    """Find the nearest other decoder row of every latent, and of random rows.

    Args:
        samples: number of draws of random rows.
        seed: seed of the random rows.

    Raises:
        Refused: a dictionary of one latent.
    """
    if dictionary.n_latents < 2:
        raise Refused(f"geometry of {dictionary!r}", "its latent has no other beside it", "give one of several latents")
    return _geometry(dictionary, samples, seed)


def _geometry(dictionary: Dictionary, samples: int, seed: int) -> Geometry:
    g = control_generator(seed)
    near, who = torch.empty(dictionary.n_latents), torch.empty(dictionary.n_latents, dtype=torch.long)
    null = torch.empty(dictionary.n_latents, samples)
    for blocks in _that_meet(dictionary):
        starts, sites = dictionary.starts, dict.fromkeys(w for b in blocks for w in dictionary.blocks[b].writes)
        here = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in blocks])
        rows = torch.cat([_rows(dictionary, b, [*sites]) for b in blocks]).cpu()
        near[here], of = nearest(rows)
        who[here] = here[of]
        for i in range(samples):
            null[here, i] = nearest(torch.randn(rows.shape, generator=g))[0]
    return Geometry(
        nearest=near,
        nearest_null=null,
        neighbour=who,
        units={"nearest": "cosine", "nearest_null": "cosine", "neighbour": "latent"},
        reasons={"nearest": "a property of the weights alone; see `over_seeds`"},
        record={"dictionary": dictionary.fingerprint(), "seed": seed, "versions": versions(), "machine": machine()},
    )


def _that_meet(dictionary: Dictionary) -> list[list[int]]:
    """Return sets of blocks: those that write a site together, directly or through others."""
    found: list[tuple[set[str], list[int]]] = []
    for b, block in enumerate(dictionary.blocks):
        meet = [(sites, blocks) for sites, blocks in found if sites & set(block.writes)]
        found = [one for one in found if one not in meet]
        found.append((set(block.writes).union(*(s for s, _ in meet)), [*(i for _, ids in meet for i in ids), b]))
    return [blocks for _, blocks in found]


def geometry_scores(dictionary: Dictionary, *, samples: int = 2, seed: int = 0) -> Scores:
    """Measure the mean cosine with the nearest other decoder row, and the share of rows with one above 0.9."""
    found = _geometry(dictionary, samples, seed)
    rows, *null = [_scores(near) for near in (found.nearest, *found.nearest_null.unbind(-1))]
    rows = [r.against([n[i] for n in null], {}) for i, r in enumerate(rows)]
    return collect(rows, {"dictionary": dictionary.fingerprint(), "interval": "over latents"})


def _scores(near: Tensor) -> list[Score]:
    return [
        over_units("nearest cosine", near, within=(-1.0, 1.0)),
        over_units("doubles", (near > 0.9).float(), "share of latents", (0.0, 1.0)),
    ]


def nearest(rows: Float[Tensor, "latent d"]) -> tuple[Float[Tensor, "latent"], Int[Tensor, "latent"]]:
    """Find the largest cosine of every row with another row, and that row's index: 0 and its own of a row alone."""
    if len(rows) == 1:
        return torch.zeros(1), torch.zeros(1, dtype=torch.long)
    unit = normalize(rows, dim=-1)
    best, who = [], []
    for first in range(0, len(unit), _ROWS):
        near = unit[first : first + _ROWS] @ unit.T
        here = torch.arange(len(near))
        near[here, first + here] = -2.0
        top = near.max(1)
        best.append(top.values)
        who.append(top.indices)
    return torch.cat(best), torch.cat(who)


def cosines(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Compute the cosines of all pairs of rows; a row of zeros has cosine 0 with everything."""
    return normalize(a.float(), dim=-1) @ normalize(b.float(), dim=-1).T
