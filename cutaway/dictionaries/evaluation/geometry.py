"""How do the decoder's directions lie to each other?

`nearest`: the largest cosine of each latent's decoder row with another one. Rows drawn at random in the same number of
dimensions are the null. Latents that write nothing have cosine 0 with everything. Nearly parallel rows are latents that
stand for one thing twice (Sharkey et al. 2022).

Control: random rows of the same number and width. Cost: no forward, and (1 + samples) products of all rows with all.
"""

from __future__ import annotations

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
    blocks = []
    for b, block in enumerate(dictionary.blocks):
        none = [torch.zeros(block.n_latents, dictionary.width(s), device=dictionary.device) for s in sites]
        blocks.append(torch.cat([dictionary.decoder[b].get(s, z).float() for s, z in zip(sites, none, strict=True)], 1))
    return torch.cat(blocks)


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
    rows = decoder_rows(dictionary).cpu()
    g = control_generator(seed)
    near, who = nearest(rows)
    null = [nearest(torch.randn(rows.shape, generator=g))[0] for _ in range(samples)]
    return Geometry(
        nearest=near,
        nearest_null=torch.stack(null, -1),
        neighbour=who,
        units={"nearest": "cosine", "nearest_null": "cosine", "neighbour": "latent"},
        reasons={"nearest": "a property of the weights alone; see `over_seeds`"},
        record={"dictionary": dictionary.fingerprint(), "seed": seed, "versions": versions(), "machine": machine()},
    )


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
    """Find the largest cosine of every row with another row, and that row's index."""
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
