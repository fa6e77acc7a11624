"""Which heads look at the previous token, the first one, or back at what has been before?

Attention on sequences (random tokens said twice, or texts) beside the keys that each type of head looks at: the
previous token, the token itself, the first token (a sink), the same token earlier (duplicate token), and what followed
the same token earlier (prefix matching, one half of induction: Elhage et al. 2021; Olsson et al. 2022,
arXiv:2209.11895). A type is a row of `heads.types`.

* `score[type, layer, head]`: attention to the type's keys, summed over them, averaged over the queries that have any
  (never the first token, which has only itself) and then over sequences; `interval`: 95 %, over sequences.
* Control: the same rows of attention with their keys shuffled among those that each query may look at (`null`).
* `copying[layer, head]`: Σλ/Σ|λ| over the eigenvalues of W_E W_V W_O W_U, 1 for a head that raises every token that it
  looks at; its control (`copying_null`) gives each head the values of another key-value head.
* `claimed[type, layer, head]`: 1 where the interval lies above `least` and above the band of the null. Induction also
  takes a `copying` above 0: a head that finds the token but lowers it completes nothing.
* Assumption: sequences of random tokens, in which no head attends by meaning. In text, duplicates and what follows them
  are few and alike. A window of attention narrower than the sequences is not taken out of the null.
* Known failures: `copying` reads the bare embedding, which late layers of trained models no longer see, and there its
  control is wide. Attention is no effect: what a head looks at need not matter (ablate it), and a first token's value
  may be next to nothing.
* Cost: one forward. Patterns are reduced layer by layer in it and never kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, null_band, one_prompt
from cutaway.heads.copying import copying
from cutaway.heads.types import TYPES, Sequences
from cutaway.models.access import forward, taps
from cutaway.models.anatomy import rope
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.repeats import Repeats

_UNITS = {"score": "attention", "interval": "attention", "null": "attention", "copying": "Σλ / Σ|λ|"}
_CELLS = 1 << 22  # most entries of one layer's patterns at once, unless one sequence has more


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
    """

    score: Float[Tensor, "type layer head"]
    interval: Float[Tensor, "type layer head bound"]
    null: Float[Tensor, "type layer head sample"]
    claimed: Float[Tensor, "type layer head"]
    copying: Float[Tensor, "layer head"]
    copying_null: Float[Tensor, "layer head sample"]

    def named(self, name: str) -> list[str]:
        """Return the heads that are claimed to be of a type, as `layer.head`, the largest scores first.

        Raises:
            Refused: no such type.
        """
        one = self.select(type=name)
        at = (one.claimed[0] > 0).nonzero().tolist()
        at.sort(key=lambda where: -float(one.score[0][tuple(where)]))
        return [f"{self.labels['layer'][i]}.{h}" for i, h in at]


@method(
    answers="Which heads look at the previous token, the first one, or back at what has been before?",
    paper="Olsson et al. 2022, arXiv:2209.11895",
    cost="prompts * F",
    control="shuffled_keys",
    rung="observational",
)
def classify(
    model: Model, prompts: Prompts | Repeats, /, *, least: float = 0.3, samples: int = 8, seed: int = 0
) -> HeadTypes:
    """Score every attention head against the types of `heads.types`.

    Args:
        least: attention that a head must give to a type's keys to be claimed.
        samples: how many shuffles make the null.
        seed: of the shuffles.

    Raises:
        Refused: a share that no head can pass, an encoder, a model without attention, or sequences of one token.
    """
    if not 0 <= least < 1:
        raise Refused(Call("classify", {"least": least}), "a score is a share of attention", "ask for 0 to below 1")
    if not model.family.causal:
        raise Refused(f"head types of {model.name}", "it is an encoder: its heads look ahead, too", "capture patterns")
    tokens = prompts.bind(model)
    if int(tokens.lengths.max()) < 2:
        raise Refused("head types", "no sequence has two tokens, and so nothing to look back at", "give longer ones")
    layers = [a.layer for a in model.places("pattern") if a.layer is not None]
    own, null = _scores(model, tokens, layers, samples, seed)
    return _result(model, layers, own, null, least, seed)


def _scores(
    model: Model, tokens: Tokens, layers: Sequence[int], samples: int, seed: int
) -> tuple[Float[Tensor, "prompt type layer head"], Float[Tensor, "prompt type layer head sample"]]:
    """Return every head's attention to the keys of every type, and to shuffled keys, sequence by sequence.

    NaN where no query of a sequence has such keys.
    """
    g, done, parts = generator(seed), list[Sequence[int]](), list[Tensor]()
    width = tokens.ids.shape[1]
    size = max(1, _CELLS // (model.shape.n_heads * width * width))
    for group in rope.apart(model.anatomy, tokens):
        for rows in (group[i : i + size] for i in range(0, len(group), size)):
            some = tokens.rows(rows)
            parts.append(_attention(model, some, layers, _keys(some, samples, g)).cpu())
            done.append(rows)
    every = rope.in_order(done, parts)  # [prompt, 1 + sample, type, layer, head]
    return every[:, 0], every[:, 1:].movedim(1, -1)


def _keys(tokens: Tokens, samples: int, g: torch.Generator) -> Bool[Tensor, "batch shuffle type q_pos k_pos"]:
    """Return the keys of every type, and as many for each query drawn at random among those it may look at."""
    s = Sequences.of(tokens)
    own = torch.stack([s.looked_at(row) for row in TYPES], 1)
    wanted, out = own.sum(-1, keepdim=True), [own]
    for _ in range(samples):
        chance = torch.rand(s.allowed.shape, generator=g).to(own.device).masked_fill(~s.allowed, 2.0)
        rank = chance.argsort(-1).argsort(-1)[:, None]
        out.append(rank < wanted)
    return torch.stack(out, 1)


def _attention(
    model: Model, tokens: Tokens, layers: Sequence[int], keys: Bool[Tensor, "batch shuffle type q_pos k_pos"]
) -> Float[Tensor, "batch shuffle type layer head"]:
    """Return the attention to some keys, averaged over the queries that have any, in one forward."""
    found, queries = dict[int, Tensor](), keys[:, 0].any(-1).sum(-1)[:, :, None]  # [batch, type, 1]

    def see(layer: int, pattern: Tensor) -> Tensor:
        flat = pattern.detach().float().flatten(2)
        given = [torch.einsum("bhx,btx->bth", flat, k.flatten(2).to(flat)) for k in keys.unbind(1)]
        found[layer] = torch.stack(given, 1) / queries[:, None].to(flat)
        return pattern

    sees = {Address("pattern", i): partial(see, i) for i in layers}
    with model.edited(), torch.no_grad(), taps.attached(model.anatomy, sees):
        forward.streams(model.anatomy, tokens, 1.0)
    return torch.stack([found[i].to(keys.device) for i in layers], 3)


def _result(model: Model, layers: list[int], own: Tensor, null: Tensor, least: float, seed: int) -> HeadTypes:
    there = [~own[:, t].isnan().flatten(1).any(1) for t in range(len(TYPES))]
    each, chance = ([x[some, t] for t, some in enumerate(there)] for x in (own, null))
    interval = torch.stack([mean_interval(x, within=(0.0, 1.0)) for x in each])
    score, control = (torch.stack([x.mean(0) for x in parts]) for parts in (each, chance))
    why = "it is of the weights alone, which have no spread over sequences"
    try:
        raises, raises_null = copying(model, layers, null.shape[-1], seed)
    except Refused as refusal:
        raises, raises_null, why = *(torch.full_like(x[0], math.nan) for x in (score, control)), refusal.why
    names = [row.name for row in TYPES]
    few = {n: "no sequence has such keys" for n, some in zip(names, there, strict=True) if not some.any()}
    few |= {n: "one sequence has such keys" for n, some in zip(names, there, strict=True) if int(some.sum()) == 1}
    claimed = interval[..., 0] > torch.stack([_high(x) for x in control]).clamp_min(least)
    for t, row in enumerate(TYPES):
        claimed[t] &= (raises > 0) | (not row.copies)
    return HeadTypes(
        score=score,
        interval=interval,
        null=control,
        claimed=claimed.float(),
        copying=raises,
        copying_null=raises_null,
        labels={"type": names, "layer": layers, "bound": BOUNDS},
        units=_UNITS,
        reasons=few | {"copying": why} | one_prompt(len(own), "score"),
        record={"sequences": dict(zip(names, (int(some.sum()) for some in there), strict=True))},
    )


def _high(null: Float[Tensor, "layer head sample"]) -> Float[Tensor, "layer head"]:
    """Return the upper end of the null's band for every head, in the scale of its layer."""
    layers = torch.arange(len(null)).repeat_interleave(null.shape[1])
    return null_band(null.flatten(0, 1), groups=layers)[0][:, 1].reshape(null.shape[:2])
