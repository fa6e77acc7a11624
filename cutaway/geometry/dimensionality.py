"""How many dimensions has each direction of a set, and how much do directions interfere?

Directions are n rows in d dimensions, usually n > d: of a model's unembedding or embedding, of a dictionary's decoder
(`dictionaries.evaluation.decoder_rows`), or of any matrix.

* `nearest`: the largest |cosine| of a direction with another one; `spread`: the root of the mean squared cosine with
  all others. `dimensionality`: ‖W_i‖² / Σ_j (Ŵ_i · W_j)² (Elhage et al. 2022, arXiv:2209.10652), 1 for a direction that
  nothing interferes with, 1/2 for one of an antipodal pair; `total`: its sum over all directions, at most the rank.
* Bounds: no n directions have a spread, and so a largest cosine, below `welch` = √((n − d) / (d (n − 1))) (Welch 1974).
  `johnson_lindenstrauss` = √(4 ln n / d): exp(d ε² / 4) almost orthogonal directions exist within ε.
* Control (`null` and the other `_null` fields): as many random directions of the same lengths.
* Of more than `most` directions, that many at equal steps are looked at; each is compared with all.
* Assumption: each row is a direction that something uses. Rows of tokens that never occurred are near each other.
* Known failures: rows with a mean far from 0 all share it and have large cosines, unless `centred` takes it out.
* Equivalence (tests): an orthonormal set has dimensionality 1 each, spread 0 and total d; a pentagon 2/5 each.
* Cost: no forward; products of the chosen directions with all, (1 + samples) times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval
from cutaway.geometry.directions import Directions

_UNITS: dict[str, str] = dict.fromkeys(("nearest", "spread", "mean_nearest"), "cosine")
_UNITS |= dict.fromkeys(("dimensionality", "total"), "dimensions")

_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Dimensionality(Result, kind="dimensionality"):
    """Interference among directions, beside bounds and random directions.

    Attributes:
        nearest: per direction, the largest |cosine| with another one.
        null: `nearest` of random directions.
        spread: per direction, the root of the mean squared cosine with all others.
        spread_null: of random directions.
        dimensionality: per direction, the share of a dimension that it has.
        dimensionality_null: of random directions.
        mean_nearest: the mean of `nearest`, with its interval over directions.
        total: the sum of `dimensionality` over all directions.
        total_null: of random directions.
        directions: the number of directions.
        width: the number of dimensions.
        welch: the least spread, and largest cosine, that so large a set can have.
        johnson_lindenstrauss: a largest cosine that some set of this size stays below.
    """

    nearest: Float[Tensor, "direction"]
    null: Float[Tensor, "direction sample"]
    spread: Float[Tensor, "direction"]
    spread_null: Float[Tensor, "direction sample"]
    dimensionality: Float[Tensor, "direction"]
    dimensionality_null: Float[Tensor, "direction sample"]
    mean_nearest: Float[Tensor, ""]
    mean_nearest_interval: Float[Tensor, "bound"]
    total: Float[Tensor, ""]
    total_null: Float[Tensor, "sample"]
    directions: int
    width: int
    welch: float
    johnson_lindenstrauss: float


@method(
    answers="How many dimensions has each direction of a set, and how much do directions interfere?",
    paper="Elhage et al. 2022, arXiv:2209.10652",
    cost="0",
    control="random_directions",
    rung="observational",
)
def dimensionality(
    directions: Directions, /, *, centred: bool = False, most: int = 256, samples: int = 4, seed: int = 0
) -> Dimensionality:
    """Measure the dimensionality and interference of directions beside what is possible and what chance gives.

    Args:
        centred: subtract the mean of all directions first.
        most: number of directions that are looked at one by one.
        samples: number of draws of random directions.
        seed: seed of the random directions.

    Raises:
        Refused: fewer than two directions other than 0, or none to look at.
    """
    if most < 1:
        raise Refused(Keyword("most", most), "no direction is looked at", "look at one or more")
    kept = (directions.rows.norm(dim=1) > 0).nonzero()[:, 0]
    w = directions.rows[kept]
    w = w - w.mean(0) if centred else w
    n, d = w.shape
    if n < 2:
        raise Refused("the directions", f"{n} of them are not 0", "give two or more")
    chosen = torch.linspace(0, n - 1, min(n, most), dtype=torch.double).round().long()
    g, lengths = generator(seed), w.norm(dim=1, keepdim=True)
    null = [_interference(lengths * normalize(torch.randn(n, d, generator=g), dim=1), chosen) for _ in range(samples)]
    own = _interference(w, chosen)
    nearest, spread, share, total = ([one[k] for one in null] for k in range(4))
    return Dimensionality(
        nearest=own[0],
        null=torch.stack(nearest, -1),
        spread=own[1],
        spread_null=torch.stack(spread, -1),
        dimensionality=own[2],
        dimensionality_null=torch.stack(share, -1),
        mean_nearest=own[0].mean(),
        mean_nearest_interval=mean_interval(own[0], within=(0.0, 1.0)),
        total=own[3],
        total_null=torch.stack(total),
        directions=n,
        width=d,
        welch=math.sqrt(max(0, n - d) / (d * (n - 1))),
        johnson_lindenstrauss=math.sqrt(4 * math.log(n) / d),
        labels={"direction": [directions.names[i] for i in kept[chosen].tolist()], "bound": BOUNDS},
        units=_UNITS,
        reasons={"nearest": "a property of the weights alone"},
        record={"zero rows": len(directions.rows) - n},
    )


def _interference(
    w: Float[Tensor, "direction d"], chosen: Tensor
) -> tuple[Float[Tensor, "chosen"], Float[Tensor, "chosen"], Float[Tensor, "chosen"], Float[Tensor, ""]]:
    """Return largest cosines, spreads and dimensionalities of the chosen directions, and the sum of the last over all.

    Sums of squared products with all rows are quadratic forms of Wᵀ W.
    """
    unit = normalize(w, dim=1)
    cosines = (unit[chosen] @ unit.T).abs()
    cosines[torch.arange(len(chosen)), chosen] = 0.0
    among = (w.T @ w).double()
    forms = torch.cat([((part.double() @ among) * part).sum(1) for part in unit.split(_ROWS)])
    shares = w.square().sum(1) / forms
    spread = cosines.double().square().sum(1).div(len(w) - 1).sqrt()
    return cosines.amax(1), spread.float(), shares[chosen].float(), shares.sum().float()
