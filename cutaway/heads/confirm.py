"""Do the heads that look back carry the prediction of what has been said before?

The heads that `heads.classify` claims for a type (or named ones) are removed at once, and the loss is read where going
on with what was said before gives the right token: an earlier token equals the query's, and its follower comes next
(Olsson et al. 2022, arXiv:2209.11895). Single removals miss heads that stand in for each other; sets do not.

* `effect[span, type]`: rise of the loss at tokens that were said before, in nats, mean over sequences; positive where
  the heads help. Beside it the rise elsewhere: heads that matter for everything raise both.
* `accuracy[span, type]`: share of these tokens that stay likeliest; the record says how many are without removal.
* `how`: a head is removed by its mean z over the tokens of all sequences (first and special tokens left in place), or
  by zeros.
* `interval`, `accuracy_interval`: 95 %, over sequences that have such tokens. Control (`null`, `accuracy_null`): random
  sets of other heads, as many of each layer where enough are left; the record says how they are matched.
* Assumption: the sequences that show the heads also measure them. Claims rest on attention, not on loss, so a random
  set is not chosen for a larger effect, but other sequences make a fairer test: give the heads by name.
* Known failures: a set of many heads costs something wherever it is; its random sets then repeat, or cannot be drawn. A
  mean is what every token shares, and not nothing. Random sets may hold heads of the same kind.
* Equivalence (test): the loss under hand-written hooks on plain transformers.
* Cost: a classification, and one forward a set and random set, from its first layer on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval
from cutaway.heads.classify import classify
from cutaway.heads.types import Sequences, check_least, chosen
from cutaway.interventions.ablation_values import SINKS, removals
from cutaway.interventions.components import all_components, components, random_heads
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.repeats import Repeats

NAMED = "named heads"
SPANS = ["said before", "elsewhere"]
SAYS = {"mean": "the head's mean over the tokens of all sequences", "zero": "zeros"}
_UNITS = {
    **dict.fromkeys(("effect", "interval", "null"), "nats"),
    **dict.fromkeys(("accuracy", "accuracy_interval", "accuracy_null"), "share of tokens"),
    "removed": "heads",
}


@dataclass(frozen=True, kw_only=True)
class TypeEffects(Result, kind="head_type_effects"):
    """Joint effects of removing the heads of each type, beside random sets of as many heads.

    Attributes:
        effect: rise of the loss at tokens that were said before, and at all others.
        accuracy: share of these tokens that are likeliest without the heads.
        removed: number of heads removed.
    """

    effect: Float[Tensor, "span type"]
    interval: Float[Tensor, "span type bound"]
    null: Float[Tensor, "span type sample"]
    accuracy: Float[Tensor, "span type"]
    accuracy_interval: Float[Tensor, "span type bound"]
    accuracy_null: Float[Tensor, "span type sample"]
    removed: Int[Tensor, "type"]


@method(
    answers="Do the heads that look back carry the prediction of what has been said before?",
    paper="Olsson et al. 2022, arXiv:2209.11895",
    cost="prompts * (3 + type * (1 + sample)) * F",
    control="random_sets",
    rung="interventional",
)
def confirm(
    model: Model,
    prompts: Prompts | Repeats,
    /,
    *,
    types: tuple[str, ...] = (),
    heads: tuple[str, ...] = (),
    how: Literal["mean", "zero"] = "mean",
    least: float = 0.3,
    samples: int = 8,
    seed: int = 0,
) -> TypeEffects:
    """Remove the heads of each type at once, and read the loss at tokens that were said before.

    Args:
        types: only these types; all if empty.
        heads: these heads (`4.0,4.3`) in place of the claimed ones.
        how: what stands in for the heads.
        least: attention that a head must give to a type's keys to be claimed.
        samples: how many random sets of as many heads make the null.
        seed: of the random sets, and of the shuffles behind the claims.

    Raises:
        Refused: no such type or head, types beside named heads, sequences of one token, or what `heads.classify`
            refuses.
    """
    sets = _sets(model, prompts, types, heads, least, seed)
    said: dict[str, str] = {"stands in": SAYS[how], "left in place": SINKS if how == "mean" else "nothing"}
    tokens, pool, chosen = prompts.bind(model), all_components(model, mlps=False), dict[str, int]()
    variants, why = list[list[Address]](), dict[str, str]()
    for name, places in sets.items():
        if not places:
            why[name] = "no head is claimed to be of it"
            continue
        random = random_heads(pool, places, samples, seed)
        if random.why:
            why[name] = random.why
            continue
        chosen[name] = len(variants)
        variants += [places, *random.sets]
        said[name] = f"{len(places)} heads; random sets: {random.matched}"
    return _result(sets, _losses(model, tokens, variants, how), chosen, why, said, samples)


def _sets(
    model: Model, prompts: Prompts | Repeats, types: tuple[str, ...], heads: tuple[str, ...], least: float, seed: int
) -> dict[str, list[Address]]:
    """Return the heads to remove under each name."""
    if heads:
        if types:
            asked = Call("confirm", {"types": types, "heads": heads})
            raise Refused(asked, "named heads are of no type", "give one of the two")
        return {NAMED: components(model, heads)}
    asked = chosen(types)
    check_least("confirm", least)
    found = classify(model, prompts, least=least, eigenvalues=False, seed=seed)
    return {name: components(model, at) if (at := found.named(name)) else [] for name in (row.name for row in asked)}


def _losses(
    model: Model, tokens: Tokens, variants: Sequence[Sequence[Address]], how: Literal["mean", "zero"]
) -> Float[Tensor, "variant prompt column"]:
    """Return the sums of `_columns` without any removal, then under the removal of each set."""
    edits = removals(model, tokens, variants, how)
    measure = Measure(_columns, Reads(last_logits=False, places=(Address("logits"),)))
    clean = model.measure(tokens, measure).float().cpu()
    return torch.cat([clean[None], sweep(model, tokens, edits, measure).float().cpu()]) if edits else clean[None]


def _columns(seen: Seen, prompt: Tensor) -> Float[Tensor, "row column"]:
    """Return loss, hits and number of the tokens that were said before, then of all others.

    The first token of a sequence is none of them: nothing predicts it, and it alone predicts the next.
    """
    assert seen.activations is not None
    tokens, logits = seen.activations.tokens, seen.activations["logits"]
    s, after = Sequences.of(tokens), tokens.ids.roll(-1, 1)
    asks = (tokens.mask & tokens.mask.roll(-1, 1))[:, :-1] & (s.query[:, :-1, 0] > 0)
    right = s.after_same & s.allowed & (s.back > 0) & (s.ids[:, None, :] == after[:, :, None])
    again = right.any(-1)[:, :-1]
    x, y = logits[:, :-1].float(), after[:, :-1, None].to(logits.device)
    loss, hit = x.logsumexp(-1) - x.gather(-1, y)[..., 0], (x.argmax(-1) == y[..., 0]).float()
    where = [m.to(loss) for m in (asks & again, asks & ~again)]
    return torch.stack([(v * m).sum(-1) for m in where for v in (loss, hit, torch.ones_like(loss))], -1)


def _result(
    sets: dict[str, list[Address]],
    found: Float[Tensor, "variant prompt column"],
    chosen: dict[str, int],
    why: dict[str, str],
    said: dict[str, str],
    samples: int,
) -> TypeEffects:
    sums = found.unflatten(-1, (2, 3))  # [variant, prompt, span, loss hits number]
    if not bool(sums[0, ..., 2].sum()):
        raise Refused("the loss of predictions", "no sequence has three tokens", "give longer ones")
    each = sums[..., :2] / sums[:1, ..., 2:]  # means over a sequence's tokens; NaN where it has none
    shape, fields = (2, len(sets)), dict[str, Any]()
    for name, x in (("", each[1:, ..., 0] - each[:1, ..., 0]), ("accuracy_", each[1:, ..., 1])):
        value, null = torch.full(shape, math.nan), torch.full((*shape, samples), math.nan)
        interval = torch.full((*shape, 2), math.nan)
        for t, key in enumerate(sets):
            for where in range(2) if key in chosen else ():
                at, some = chosen[key], sums[0, :, where, 2] > 0
                mine = x[at : at + 1 + samples, some, where]
                value[where, t], null[where, t] = mine[0].mean(), mine[1:].mean(-1)
                interval[where, t] = mean_interval(mine[0], within=(0.0, 1.0) if name else (-math.inf, math.inf))
        fields |= {name.strip("_") or "effect": value, f"{name}interval": interval, f"{name}null": null}
    said_again, few = (sums[0, :, where, 2] > 0 for where in range(2)), dict[str, str]()
    for name, some in zip(SPANS, said_again, strict=True):
        few |= {name: f"{int(some.sum()) or 'no'} sequence has such tokens"} if int(some.sum()) < 2 else {}
    if why or few:
        few |= {name: few.get(name, "some types have no heads to remove") for name in SPANS if why}
        few["effect"] = "types without heads and tokens that no two sequences have say so"
    return TypeEffects(
        **fields,
        removed=torch.tensor([len(places) for places in sets.values()]),
        labels={"span": SPANS, "type": list(sets), "bound": BOUNDS},
        units=_UNITS,
        reasons=few | why,
        record={
            "repeated tokens": int(sums[0, :, 0, 2].sum()),
            "loss with all heads": _means(each[0, ..., 0]),
            "accuracy with all heads": _means(each[0, ..., 1]),
            "heads": {name: [f"{a.layer}.{a.unit}" for a in places] for name, places in sets.items() if places},
            **said,
        },
    )


def _means(x: Float[Tensor, "prompt span"]) -> list[float | None]:
    """Return the mean of each class of tokens over the sequences that have any; None where none has."""
    return [None if math.isnan(m) else m for m in x.nanmean(0).tolist()]
