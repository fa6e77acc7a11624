"""Does an attribution graph keep the same features when the prompt says the same in other words?

A graph explains one prompt (Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs). Features that are
the model's reason are kept in paraphrases; those of the wording are not.

* Definition: the kept set of a prompt is the smallest set of nodes that holds `share` of the influence
  (`graphs.prune`), its units by layer and number, whatever their positions. `overlap[prompt, other]` is the Jaccard
  index |A ∩ B| / |A ∪ B|, `stability` its mean over pairs of different prompts, and `kept[unit]` the share of prompts
  that keep a unit, of those of most influence.
* Interval: percentiles over resamples of prompts, pairs of a prompt with itself left out; below three prompts NaN.
* Control (`stability_null`, `kept_null`): in each prompt as many units of each layer drawn from all that are active
  there. Units that are active whatever is said overlap by chance, and late layers keep more of what they have.
* Known failures: the prompts must mean the same, which only their author knows; a stable set may be one that any prompt
  has, so prompts that mean something else are the comparison to make. Two features that split one meaning count apart.
* Equivalences (tests): one prompt twice has overlap 1; kept sets are those of `graphs.prune`.
* Cost: no forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.node import Latent
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.prune import covering

Unit = tuple[int, int]  # layer and number
_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class GraphStability(Result, kind="graph_stability"):
    """Overlap of the features that graphs of several prompts keep.

    Attributes:
        stability: the mean Jaccard index of two prompts' kept units.
        stability_interval: its bounds.
        stability_null: the same of random active units.
        overlap: the index of each two prompts.
        kept: the share of prompts that keep a unit.
        kept_null: the share that does by chance.
        influence: the unit's influence, mean over prompts.
    """

    page = ("kept",)

    stability: Float[Tensor, ""]
    stability_interval: Float[Tensor, "bound"]
    stability_null: Float[Tensor, "sample"]
    overlap: Float[Tensor, "prompt other"]
    kept: Float[Tensor, "node"]
    kept_null: Float[Tensor, "node sample"]
    influence: Float[Tensor, "node"]


def stability(
    graphs: Sequence[AttributionGraph], *, share: float = 0.8, top: int = 20, samples: int = 20, seed: int = 0
) -> GraphStability:
    """Compare the units that traced graphs of several prompts keep.

    Args:
        graphs: the graphs, over the same units of one model.
        share: the share of influence that kept nodes hold.
        top: how many units are listed, those of the largest mean influence.
        samples: how many draws of random units make the null.
        seed: of the draws and resamples.

    Raises:
        Refused: a single graph, graphs of other units or models, or none that keeps a unit.
    """
    _check(graphs)
    active, kept = [_influences(g) for g in graphs], [_kept(g, share) for g in graphs]
    mean = {u: sum(a.get(u, 0.0) for a in active) / len(active) for u in set().union(*kept)}
    if not mean:
        raise Refused(Keyword("share", share), "no graph keeps a unit", "give a larger share, or graphs of other units")
    listed = sorted(mean, key=lambda u: (-mean[u], u))[:top]
    g = generator(seed)
    drawn = [[_alike(a, k, g) for a, k in zip(active, kept, strict=True)] for _ in range(samples)]
    overlap, prompts = _overlaps(kept), [str(g.record.get("prompt", n)) for n, g in enumerate(graphs)]
    return GraphStability(
        stability=_mean(overlap),
        stability_interval=torch.tensor(_interval(overlap, g)),
        stability_null=torch.tensor([float(_mean(_overlaps(sets))) for sets in drawn]),
        overlap=overlap,
        kept=_share(listed, kept),
        kept_null=torch.stack([_share(listed, sets) for sets in drawn], -1),
        influence=torch.tensor([mean[u] for u in listed]),
        labels={
            "node": [_name(u, graphs) for u in listed],
            "prompt": [f"{n} {text}" for n, text in enumerate(prompts)],
            "other": [str(n) for n in range(len(graphs))],
            "bound": BOUNDS,
        },
        units={"stability": "Jaccard index", "kept": "share of prompts", "influence": "share of influence"},
        reasons={} if len(graphs) > 2 else {"stability": "two prompts are one pair"},
        record={"kept units": [len(k) for k in kept], "active units": [len(a) for a in active], "share": share},
    )


def _check(graphs: Sequence[AttributionGraph]) -> None:
    if len(graphs) < 2:
        raise Refused("stability of one graph", "nothing is compared", "trace paraphrases of its prompt too")
    if len({(g.layers, g.vocabulary, _of_neurons(g)) for g in graphs}) > 1:
        raise Refused("stability of graphs", "they are of different models or units", "trace all with the same ones")


def _of_neurons(g: AttributionGraph) -> bool:
    return any(isinstance(n, Address) and n.site == "mlp_post" for n in g.nodes)


def _name(unit: Unit, graphs: Sequence[AttributionGraph]) -> str:
    return str(Address("mlp_post", *unit) if _of_neurons(graphs[0]) else Latent(*unit))


def _units(g: AttributionGraph) -> list[tuple[int, Unit]]:
    """Return each node that is a unit, with its layer and number."""
    out = list[tuple[int, Unit]]()
    for i, node in enumerate(g.nodes):
        if isinstance(node, Latent):
            out.append((i, (node.block, node.index)))
        elif isinstance(node, Address) and node.site == "mlp_post":
            out.append((i, (node.layer or 0, node.unit or 0)))
    return out


def _influences(g: AttributionGraph) -> dict[Unit, float]:
    """Return the influence of each unit, summed over positions."""
    found = dict[Unit, float]()
    for i, unit in _units(g):
        found[unit] = found.get(unit, 0.0) + float(g.influence[i])
    return found


def _kept(g: AttributionGraph, share: float) -> set[Unit]:
    stays = covering(g.influence, share)
    return {unit for i, unit in _units(g) if stays[i]}


def _alike(active: dict[Unit, float], kept: set[Unit], g: torch.Generator) -> set[Unit]:
    """Return as many random active units of each layer as are kept."""
    out = set[Unit]()
    for layer in {layer for layer, _ in kept}:
        pool = sorted(u for u in active if u[0] == layer)
        n = sum(u[0] == layer for u in kept)
        out |= {pool[i] for i in torch.randperm(len(pool), generator=g)[:n].tolist()}
    return out


def _overlaps(sets: Sequence[set[Unit]]) -> Float[Tensor, "prompt other"]:
    """Return the Jaccard index of each two sets; two empty ones are alike."""
    return torch.tensor([[len(a & b) / len(a | b) if a | b else 1.0 for b in sets] for a in sets])


def _mean(overlap: Float[Tensor, "prompt other"]) -> Float[Tensor, ""]:
    """Return the mean over pairs of different prompts."""
    apart = ~torch.eye(len(overlap), dtype=torch.bool)
    return overlap[apart].mean()


def _interval(overlap: Float[Tensor, "prompt other"], g: torch.Generator) -> tuple[float, float]:
    n = len(overlap)
    if n < 3:
        return math.nan, math.nan
    drawn = torch.randint(n, (_RESAMPLES, n), generator=g)
    pairs = overlap[drawn[:, :, None], drawn[:, None, :]].flatten(1)  # [resample, pair]
    apart = (drawn[:, :, None] != drawn[:, None, :]).flatten(1)
    some = apart.any(1)
    means = (pairs * apart).sum(1)[some] / apart.sum(1)[some]
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _share(units: Sequence[Unit], sets: Sequence[set[Unit]]) -> Float[Tensor, "node"]:
    return torch.tensor([sum(u in s for s in sets) / len(sets) for u in units])
