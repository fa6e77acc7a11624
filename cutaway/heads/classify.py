"""Which heads look at the previous token, the first one, or back at what has been before?

Attention on sequences (random tokens said twice, or texts) beside the keys that each type of head looks at: the
previous token, the token itself, the first token (a sink), the same token earlier (duplicate token), what followed the
same token earlier (prefix matching: Elhage et al. 2021; Olsson et al. 2022, arXiv:2209.11895), punctuation and line
breaks (delimiter), and the five tokens before (local window). A type is a row of `heads.types`.

* `score[type, layer, head]`: attention to the type's keys, summed over them, averaged over the queries that have any
  (never the first token, which has only itself) and then over sequences; `interval`: 95 %, over sequences.
* `weighted`: the same share of attention times the norm of the values (Kobayashi et al. 2020, arXiv:2004.10102): a
  head that rests on a first token whose value is next to nothing reads little there.
* `raises`: the direct effect of the head's whole output at the query on the logits of the tokens at the keys, less its
  mean over the vocabulary and in standard deviations of its effects there, averaged over queries and keys.
* Control: the same rows with their keys shuffled among those that each query may look at within the layer's window
  (`null`; `raises_null` for the tokens at those keys).
* `claimed[type, layer, head]`: 1 where the interval of `score` lies above `least` and above the band of the null.
  Induction is prefix matching by a head that also raises the tokens, anti-induction (on repeats, one that suppresses
  copies: McDougall et al. 2023, arXiv:2310.04625) by one that lowers them: the interval of `raises` lies beyond 0 and
  beyond the band of its null.
* `copying[layer, head]`: Σλ/Σ|λ| over the eigenvalues of W_E W_V W_O W_U; its control (`copying_null`) gives each head
  the values of another key-value head. No claim depends on it; without `eigenvalues` it is left out.
* `distance[layer, head]`: how many tokens back a head looks, the first token left out; the record says how many one
  would that looks at all tokens alike.
* Assumption: sequences of random tokens, in which no head attends by meaning. In text, duplicates and what follows them
  are few and alike. What a token is at a key stands for what is attended: deep in a model it may hold more.
* Known failures: `copying` reads the bare embedding, which late layers of trained models no longer see: it is negative
  for heads that copy. `raises` leaves out what later layers make of the output: a head that matches prefixes and
  copies through them is no induction head here. Attention is no effect: what a head
  looks at need not matter (`heads.confirm` removes the claimed heads). Types overlap: a previous-token head looks at a
  local window.
* Cost: one forward. Patterns are reduced layer by layer in it and never kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, layer_band, mean_interval, one_prompt
from cutaway.heads.pattern_sums import Sums, Watch, pattern_sums
from cutaway.heads.types import HeadType, check_least, chosen, ranked
from cutaway.models.copying import copying
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.repeats import Repeats

_UNITS = {
    **dict.fromkeys(("score", "interval", "null"), "attention"),
    **dict.fromkeys(("weighted", "weighted_interval"), "share of attention × value norm"),
    **dict.fromkeys(("raises", "raises_interval", "raises_null"), "standard deviations over the vocabulary"),
    **dict.fromkeys(("copying", "copying_null"), "Σλ / Σ|λ|"),
    **dict.fromkeys(("distance", "distance_interval"), "tokens back"),
}


@dataclass(frozen=True, kw_only=True)
class HeadTypes(Result, kind="head_types"):
    """Scores of every attention head for each type.

    Attributes:
        score: the mean attention to the type's keys.
        interval: of `score`, 95 %, over sequences.
        null: `score` with the keys of every query shuffled.
        claimed: 1 for a head that is of a type, 0 for others.
        copying: the eigenvalue score of the OV circuit; NaN where the model has none in its weights.
        copying_null: `copying` with the values of another key-value head.
        weighted: the share of the type's keys in attention times the norm of the values.
        raises: how far the head raises the tokens at the type's keys over the vocabulary.
        raises_null: `raises` of the tokens at shuffled keys.
        distance: how many tokens back the head looks, the first token left out.
    """

    score: Float[Tensor, "type layer head"]
    interval: Float[Tensor, "type layer head bound"]
    null: Float[Tensor, "type layer head sample"]
    claimed: Float[Tensor, "type layer head"]
    copying: Float[Tensor, "layer head"]
    copying_null: Float[Tensor, "layer head sample"]
    weighted: Float[Tensor, "type layer head"] | None
    weighted_interval: Float[Tensor, "type layer head bound"] | None
    raises: Float[Tensor, "type layer head"] | None
    raises_interval: Float[Tensor, "type layer head bound"] | None
    raises_null: Float[Tensor, "type layer head sample"] | None
    distance: Float[Tensor, "layer head"] | None
    distance_interval: Float[Tensor, "layer head bound"] | None

    def named(self, name: str) -> list[str]:
        """Return the heads that are claimed to be of a type, as `layer.head`, the largest scores first.

        Raises:
            Refused: no such type.
        """
        one = self.select(type=name)
        return ranked(one.claimed[0], one.score[0], self.labels["layer"])


@method(
    answers="Which heads look at the previous token, the first one, or back at what has been before?",
    paper="Olsson et al. 2022, arXiv:2209.11895",
    cost="prompts * F",
    control="shuffled_keys",
    rung="observational",
)
def classify(
    model: Model,
    prompts: Prompts | Repeats,
    /,
    *,
    types: tuple[str, ...] = (),
    least: float = 0.3,
    eigenvalues: bool = True,
    samples: int = 8,
    seed: int = 0,
) -> HeadTypes:
    """Score every attention head against the types of `heads.types`.

    Args:
        types: the types to score [default: all]; what heads write is read if one of them is about it.
        least: attention that a head must give to a type's keys to be claimed.
        eigenvalues: also score the OV circuits by their eigenvalues, which takes as long as some forwards.
        samples: how many shuffles make the null.
        seed: of the shuffles.

    Raises:
        Refused: no such type, a share that no head can pass, an encoder, a model without attention, or sequences of one
            token.
    """
    check_least("classify", least)
    return scored(model, prompts.bind(model), chosen(types), least, eigenvalues, samples, seed)


def scored(
    model: Model,
    tokens: Tokens,
    types: Sequence[HeadType],
    least: float,
    eigenvalues: bool,
    samples: int,
    seed: int,
    also: Mapping[Address, Watch] | None = None,
) -> HeadTypes:
    """Return the scores of every head; `also` sees activations of the same forward.

    Raises:
        Refused: an encoder, a model without attention, or sequences of one token.
    """
    if not model.family.causal:
        raise Refused(f"head types of {model.name}", "it is an encoder: its heads look ahead, too", "capture patterns")
    if int(tokens.lengths.max()) < 2:
        raise Refused("head types", "no sequence has two tokens, and so nothing to look back at", "give longer ones")
    layers = [a.layer for a in model.places("pattern") if a.layer is not None]
    sums, unread = pattern_sums(model, tokens, types, layers, samples, seed, also)
    return _result(types, layers, sums, unread, least, _eigenvalues(model, layers, samples, seed, eigenvalues))


def _eigenvalues(model: Model, layers: list[int], samples: int, seed: int, asked: bool) -> tuple[Tensor, Tensor, str]:
    """Return the eigenvalue scores, their null, and why they have no interval or are not there."""
    why = "they were not asked for"
    if asked:
        try:
            return *copying(model, layers, samples, seed), "it is of the weights alone, without spread over sequences"
        except Refused as refusal:
            why = refusal.why
    shape = (len(layers), model.shape.n_heads)
    return torch.full(shape, math.nan), torch.full((*shape, samples), math.nan), why


def _result(
    types: Sequence[HeadType],
    layers: list[int],
    sums: Sums,
    unread: dict[str, str],
    least: float,
    eigenvalues: tuple[Tensor, Tensor, str],
) -> HeadTypes:
    own, chance, names = sums.attention[:, 0], sums.attention[:, 1:].movedim(1, -1), [row.name for row in types]
    there = [~own[:, t].isnan().flatten(1).any(1) for t in range(len(types))]
    score, interval = _means(own, there, within=(0.0, 1.0))
    weighted, weighted_interval = _means(sums.weighted, there, within=(0.0, 1.0))
    raises, raises_interval = _means(sums.raises[:, 0], there)
    null, raises_null = (_means(x, there)[0] for x in (chance, sums.raises[:, 1:].movedim(1, -1)))
    eigen, eigen_null, why = eigenvalues
    few = {n: "no sequence has such keys" for n, some in zip(names, there, strict=True) if not some.any()}
    few |= {n: "one sequence has such keys" for n, some in zip(names, there, strict=True) if int(some.sum()) == 1}
    claimed = interval[..., 0] > torch.stack([layer_band(x)[1] for x in null]).clamp_min(least)
    for t, row in enumerate(types):
        low, high = layer_band(raises_null[t])
        up, down = raises_interval[t, ..., 0] > high.clamp_min(0), raises_interval[t, ..., 1] < low.clamp_max(0)
        claimed[t] &= {1: up, -1: down, 0: torch.ones_like(up)}[row.writes]
    said = dict(unread)
    said |= {"score": "too few sequences have keys of some types: those say so"} if few else {}
    said |= {"distance": "how far it is where all tokens are looked at alike stands in the record"}
    return HeadTypes(
        score=score,
        interval=interval,
        null=null,
        claimed=claimed.float(),
        copying=eigen,
        copying_null=eigen_null,
        weighted=weighted,
        weighted_interval=weighted_interval,
        raises=raises,
        raises_interval=raises_interval,
        raises_null=raises_null,
        distance=sums.distance.mean(0),
        distance_interval=mean_interval(sums.distance),
        labels={"type": names, "layer": layers, "bound": BOUNDS},
        units=_UNITS,
        reasons=few | {"copying": why} | said | one_prompt(len(own), "score"),
        record={
            "controls": {"copying": "exchanged_values"},
            "sequences": dict(zip(names, (int(some.sum()) for some in there), strict=True)),
            "tokens back of uniform attention": float(sums.uniform.mean()),
        },
    )


def _means(
    x: Float[Tensor, "prompt type *cell"], there: list[Tensor], within: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[Float[Tensor, "type *cell"], Float[Tensor, "type *cell bound"]]:
    """Return the mean and its interval of every type, over the sequences that have its keys."""
    each = [x[some, t] for t, some in enumerate(there)]
    return torch.stack([e.mean(0) for e in each]), torch.stack([mean_interval(e, within=within) for e in each])
