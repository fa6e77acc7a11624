"""How many different things does a neuron fire at?

The `contexts` in which a neuron fires most are held against each other, in two views: what the MLP reads at their last
token (`mlp_in`, its mean over tokens subtracted), and that token itself.

* `score[view, half, neuron]`: the effective number of different contexts, exp(entropy) of the eigenvalues of K / n: K
  has the cosines of n contexts, or 1 where two tokens are the same (Friedman & Dieng 2023, arXiv:2210.02410). It is m
  for m equally large groups of contexts that have nothing in common, 1 if all are the same, and n if none are alike.
* `clusters[half, neuron]`: the number of groups: average linkage, cut at the cosine that 5 % of all pairs exceed.
  `cluster` has each context's group, and `groups()` the contexts themselves.
* Halves: every second text, each with contexts of its own, so that a number can be seen twice.
* `interval`: 95 %, by the jackknife over contexts.
* Control (`null`, `clusters_null`): random directions of the layer's activations, as neurons of a rotated basis. A
  neuron is monosemantic only as far as it stays below them: a random direction also fires most at like contexts
  (Bolukbasi et al. 2021, arXiv:2104.07143).
* Without `neurons`, the `top` of each layer by their update at the last tokens, as in `neurons.values`.
* Assumption: contexts that mean the same lie near to each other in what the MLP reads.
* Known failures: the largest activations are no picture of the rest, which is often less of a kind. A concept that is
  broad counts as many. Tokens of one text are not independent, so that intervals are too narrow, and without width
  where all contexts are the same or none are alike.
* Cost: three forwards, or two where neurons are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.neurons import contexts as contexts_
from cutaway.neurons import memories
from cutaway.neurons.contexts import HALVES, Units
from cutaway.neurons.memories import Neuron
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.prompts import Prompts

VIEWS = ["what is read", "token"]
_POOL = 512  # most tokens that the mean and the cut are taken of
_CUT = 0.95  # quantile of the cosines of pairs of tokens
_SAME = 1 - 1e-6  # cosine of equal contexts, but for rounding: the largest cut


@dataclass(frozen=True, kw_only=True)
class Polysemanticity(Result, kind="polysemanticity"):
    """Numbers of different contexts in which single neurons fire most.

    Attributes:
        score: effective number of different contexts.
        interval: of `score`, 95 %, over contexts.
        null: `score` of random directions of the layer's activations.
        clusters: number of groups of contexts.
        clusters_null: `clusters` of random directions.
        cluster: group of each context, the largest group first; the labels have the contexts. −1 where there is none.
    """

    score: Float[Tensor, "view half neuron"]
    interval: Float[Tensor, "view half neuron bound"]
    null: Float[Tensor, "view half neuron sample"]
    clusters: Float[Tensor, "half neuron"]
    clusters_null: Float[Tensor, "half neuron sample"]
    cluster: Int[Tensor, "half neuron rank"]

    def groups(self, neuron: str, half: str = "chose") -> list[list[str]]:
        """Return the contexts of a neuron by groups, the largest group first.

        Raises:
            Refused: no such neuron or half.
        """
        h, n = self._entries("half", half)[0], self._entries("neuron", neuron)[0]
        said, of = self.labels["cluster"][h][n], self.cluster[h, n].tolist()
        return [[text for text, g in zip(said, of, strict=True) if g == group] for group in range(max(of) + 1)]


@method(
    answers="How many different things does a neuron fire at?",
    paper="Friedman & Dieng 2023, arXiv:2210.02410; Bolukbasi et al. 2021, arXiv:2104.07143",
    cost="3 * prompts * F",
    control="random_directions",
    rung="observational",
)
def polysemanticity(
    model: Model,
    prompts: Prompts,
    /,
    *,
    neurons: tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    top: int = 4,
    contexts: int = 16,
    sign: Literal["positive", "negative"] = "positive",
    samples: int = 10,
    seed: int = 0,
) -> Polysemanticity:
    """Count the different contexts in which single neurons fire most, beside random directions.

    Args:
        neurons: these, as `layer.neuron`: `3.17,5.2`; without, those with the largest updates at the last tokens.
        layers: without `neurons`, look only in these; everywhere if empty.
        top: how many neurons of each layer.
        contexts: how many contexts of each half, at least 2 and at most a quarter of its tokens.
        sign: the largest activations, or the smallest.
        samples: how many random directions of each layer make the null.
        seed: of the directions.

    Raises:
        Refused: no such neuron, an encoder, a model without dense MLPs, or texts without a token between others.
    """
    check_predicts(model)
    tokens = contexts_.once(prompts.bind(model))
    chosen = memories.asked(model, tokens, neurons, layers, top)
    parts, flip = contexts_.halves(model, tokens), -1.0 if sign == "negative" else 1.0
    room = contexts_.room(parts)
    k = min(room, max(2, min(contexts, room // 4)))
    places = _places(model, tokens, chosen, parts, k, flip, samples, seed)  # [half, rank, neuron, 1 + sample]
    return _result(model, tokens, chosen, parts, places)


def _result(
    model: Model,
    tokens: Tokens,
    chosen: Sequence[Neuron],
    parts: Sequence[Bool[Tensor, "batch position"]],
    places: Int[Tensor, "half rank neuron variant"],
) -> Polysemanticity:
    k, variants, held = places.shape[1], places.shape[3], 1 + bool(parts[1].any())
    grams, cut = _grams(model, tokens, chosen, places[:held], parts)
    score = torch.full((2, 2, len(chosen), variants), torch.nan)
    spread, count = torch.full((2, 2, len(chosen)), torch.nan), torch.full((2, len(chosen), variants), torch.nan)
    group = torch.full((2, len(chosen), k), -1)
    score[:, :held], spread[:, :held] = effective(grams).float(), _jackknife(grams[:, :, :, 0]).float()
    for h in range(held):
        for n, (layer, _) in enumerate(chosen):
            found = [_clusters(gram, cut[layer]) for gram in grams[0, h, n]]
            count[h, n] = torch.tensor([float(g.max()) + 1 for g in found])
            group[h, n] = found[0]
    t = _student(k)
    bounds = [(score[..., 0] + s * t * spread).clamp(1, k) for s in (-1, 1)]
    return Polysemanticity(
        score=score[..., 0].clone(),
        interval=torch.stack(bounds, -1),
        null=score[..., 1:].clone(),
        clusters=count[..., 0].clone(),
        clusters_null=count[..., 1:].clone(),
        cluster=group,
        labels={
            "view": VIEWS,
            "half": HALVES,
            "neuron": [memories.label(n) for n in chosen],
            "cluster": contexts_.texts(model, tokens, places[..., 0]),
            "bound": BOUNDS,
        },
        units=dict.fromkeys(("score", "interval", "null"), "contexts") | {"clusters": "groups"},
        reasons={"clusters": "it is a count of one set of contexts; score has an interval"}
        | ({} if held == 2 else {"score": "one text, so that none is held out"})
        | ({"interval": "one context"} if k < 2 else {}),
        record={
            "split": f"every second text, {len(tokens)} in all: each half is measured on contexts of its own",
            "contexts": k,
            "cut": {str(i): round(float(c), 4) for i, c in cut.items()},
        },
    )


def effective(grams: Float[Tensor, "*rest n n"]) -> Float[Tensor, "*rest"]:
    """Return exp(entropy) of the eigenvalues of K / n: the effective number of different members."""
    values = torch.linalg.eigvalsh(grams.double() / grams.shape[-1]).clamp_min(0)
    return torch.special.entr(values).sum(-1).exp()


def _jackknife(grams: Float[Tensor, "*rest n n"]) -> Float[Tensor, "*rest"]:
    """Return the standard error of the effective number, from what it is without each member; NaN of one."""
    n = grams.shape[-1]
    if n < 2:
        return torch.full(grams.shape[:-2], torch.nan)
    rest = [[j for j in range(n) if j != i] for i in range(n)]
    without = torch.stack([effective(grams[..., keep, :][..., keep]) for keep in rest], -1)
    return ((n - 1) * without.var(-1, correction=0)).sqrt()


def _student(n: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, n - 1)) if n > 1 else torch.nan


def _places(
    model: Model,
    tokens: Tokens,
    chosen: Sequence[Neuron],
    parts: Sequence[Bool[Tensor, "batch position"]],
    k: int,
    flip: float,
    samples: int,
    seed: int,
) -> Int[Tensor, "half rank neuron variant"]:
    """Return the contexts of every neuron, and of the random directions of its layer behind them."""
    g, here = generator(seed), memories.by_layer(chosen)
    turned = {i: torch.randn(model.shape.d_mlp, samples, generator=g) for i in here}

    def own(layer: int) -> Units:
        mine = [chosen[n][1] for n in here[layer]]
        return lambda x: torch.cat([x[..., mine].float() * flip, x.float() @ turned[layer].to(x.device)], -1)

    found = contexts_.largest(model, tokens, {i: own(i) for i in here}, parts, k)
    out = torch.empty(len(parts), k, len(chosen), 1 + samples, dtype=torch.long)
    for layer, mine in here.items():
        at = found[layer].place
        out[:, :, mine, 0], out[:, :, mine, 1:] = at[..., : len(mine)], at[..., None, len(mine) :]
    return out


def _grams(
    model: Model,
    tokens: Tokens,
    chosen: Sequence[Neuron],
    places: Int[Tensor, "half rank neuron variant"],
    parts: Sequence[Bool[Tensor, "batch position"]],
) -> tuple[Float[Tensor, "view half neuron variant n n"], dict[int, float]]:
    """Return the cosines of contexts with each other, if their tokens are the same, and the cut of each layer."""
    pool = (parts[0] | parts[1]).flatten().nonzero()[:, 0]
    pool = pool[torch.linspace(0, len(pool) - 1, min(len(pool), _POOL)).round().long()]
    here = memories.by_layer(chosen)
    wanted = {i: torch.cat([pool, places[:, :, mine].flatten()]).unique() for i, mine in here.items()}
    read, cut = contexts_.read_at(model, tokens, wanted), dict[int, float]()
    shape = (*places.permute(0, 2, 3, 1).shape, places.shape[1])
    grams = torch.empty(2, *shape, dtype=torch.double)
    ids = tokens.ids.cpu().flatten()[places].permute(0, 2, 3, 1)
    grams[1] = (ids[..., :, None] == ids[..., None, :]).double()
    for layer, mine in here.items():
        rows = read[layer].double()
        common = rows[torch.searchsorted(wanted[layer], pool)]
        unit = normalize(rows - common.mean(0), dim=-1)
        x = unit[torch.searchsorted(wanted[layer], places[:, :, mine])].permute(0, 2, 3, 1, 4)
        grams[0][:, mine] = x @ x.mT
        pairs = unit[torch.searchsorted(wanted[layer], pool)]
        every = (pairs @ pairs.T)[torch.ones(len(pool), len(pool)).triu(1) > 0].sort().values
        cut[layer] = min(float(every[int(_CUT * len(every))]), _SAME) if len(every) else _SAME
    return grams, cut


def _clusters(gram: Float[Tensor, "n n"], cut: float) -> Int[Tensor, "n"]:
    """Return the group of each member by average linkage, groups numbered by size."""
    from scipy.cluster.hierarchy import fcluster, linkage

    n = len(gram)
    if n < 2:
        return torch.zeros(n, dtype=torch.long)
    upper = (1 - gram)[torch.ones(n, n).triu(1) > 0].clamp_min(0)
    found = torch.from_numpy(fcluster(linkage(upper.numpy(), "average"), 1 - cut, "distance")).long() - 1
    sizes = torch.bincount(found)
    order = sizes.argsort(descending=True, stable=True)
    return order.argsort()[found]
