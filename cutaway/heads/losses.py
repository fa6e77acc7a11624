"""Loss and accuracy at spans of tokens without sets of heads, beside random sets of as many others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.stats import mean_interval
from cutaway.interventions.ablation_values import SINKS, removals
from cutaway.interventions.components import all_components, random_heads
from cutaway.interventions.span_losses import Spans, span_losses
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

How = Literal["mean", "zero"]
SAYS = {"mean": "the head's mean over the tokens of all sequences", "zero": "zeros"}


@dataclass(frozen=True)
class Losses:
    """Effects of removing sets of heads on the loss and the accuracy at spans of tokens.

    Attributes:
        fields: `effect` (rise of the loss, in nats) and `accuracy` (share of tokens that stay likeliest) by span and
            set, with their intervals and nulls; NaN without a set or such tokens.
        loss: the mean loss of each span with all heads; NaN where a prompt has no such token.
        hits: the share of its tokens that are likeliest with all heads.
        count: the number of its tokens.
        why: why a set has no effect, or a span no interval, by name.
        said: how the sets were removed and their random sets drawn, for records.
    """

    fields: dict[str, Any]
    loss: Float[Tensor, "prompt span"]
    hits: Float[Tensor, "prompt span"]
    count: Int[Tensor, "prompt span"]
    why: dict[str, str]
    said: dict[str, str]

    def means(self, x: Float[Tensor, "prompt span"]) -> list[float | None]:
        """Return the mean of each span over the prompts that have any of its tokens; None where none has."""
        return [None if math.isnan(m) else m for m in x.nanmean(0).tolist()]


def without(
    model: Model,
    tokens: Tokens,
    sets: Mapping[str, Sequence[Address]],
    spans: Spans,
    how: How,
    samples: int,
    seed: int,
    none: str,
) -> Losses:
    """Remove each set of heads at once, and as many others at random; `none` says why a set may be empty.

    Raises:
        Refused: means that these tokens do not allow.
    """
    pool, variants, at = all_components(model, mlps=False), list[list[Address]](), dict[str, int]()
    why, said = dict[str, str](), {"stands in": SAYS[how], "left in place": SINKS if how == "mean" else "nothing"}
    for name, places in sets.items():
        random = random_heads(pool, places, samples, seed)
        if not places or random.why:
            why[name] = random.why or none
            continue
        at[name] = len(variants)
        variants += [list(places), *random.sets]
        said[name] = f"{len(places)} {'head' if len(places) == 1 else 'heads'}; random sets: {random.matched}"
    sums = span_losses(model, tokens, spans, [[], *removals(model, tokens, variants, how)])
    each = sums[..., :2] / sums[:1, ..., 2:]  # loss and hits, mean over a prompt's tokens; NaN where it has none
    fields = _fields(each, list(sets), at, samples)
    return Losses(fields, each[0, ..., 0], each[0, ..., 1], sums[0, ..., 2].long(), why, said)


def _fields(
    each: Float[Tensor, "variant prompt span value"], names: Sequence[str], at: Mapping[str, int], samples: int
) -> dict[str, Tensor]:
    """Return effect and accuracy of each set, with their intervals and nulls."""
    fields, shape = dict[str, Tensor](), (each.shape[2], len(names))
    for name, x in (("effect", each[1:, ..., 0] - each[:1, ..., 0]), ("accuracy", each[1:, ..., 1])):
        value, null = torch.full(shape, math.nan), torch.full((*shape, samples), math.nan)
        interval = torch.full((*shape, 2), math.nan)
        for span, (t, key) in ((s, one) for s in range(shape[0]) for one in enumerate(names) if one[1] in at):
            some = ~each[0, :, span, 0].isnan()
            mine = x[at[key] : at[key] + 1 + samples, some, span]
            value[span, t], null[span, t] = mine[0].mean(), mine[1:].mean(-1)
            interval[span, t] = mean_interval(
                mine[0], within=(0.0, 1.0) if name == "accuracy" else (-math.inf, math.inf)
            )
        fields |= {name: value, f"{name}_interval": interval, f"{name}_null": null}
    return fields
