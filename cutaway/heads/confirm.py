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

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS
from cutaway.heads.classify import classify
from cutaway.heads.losses import How, Losses, without
from cutaway.heads.types import Sequences, check_least, chosen
from cutaway.interventions.components import components
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.repeats import Repeats

NAMED = "named heads"
BACK = ("previous token", "duplicate token", "prefix matching", "induction", "anti-induction")
SPANS = ["said before", "elsewhere"]
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
    types: tuple[str, ...] = BACK,
    heads: tuple[str, ...] = (),
    how: How = "mean",
    least: float = 0.3,
    samples: int = 4,
    seed: int = 0,
) -> TypeEffects:
    """Remove the heads of each type at once, and read the loss at tokens that were said before.

    Args:
        types: these types.
        heads: these heads (`4.0,4.3`) in place of the claimed ones.
        how: what stands in for the heads.
        least: attention that a head must give to a type's keys to be claimed.
        samples: how many random sets of as many heads make the null.
        seed: of the random sets, and of the shuffles behind the claims.

    Raises:
        Refused: no such type or head, other types beside named heads, sequences of one token, or what `heads.classify`
            refuses.
    """
    sets = _sets(model, prompts, types, heads, least, seed)
    found = without(model, prompts.bind(model), sets, spans, how, samples, seed, "no head is claimed to be of it")
    return _result(sets, found)


def _sets(
    model: Model, prompts: Prompts | Repeats, types: tuple[str, ...], heads: tuple[str, ...], least: float, seed: int
) -> dict[str, list[Address]]:
    """Return the heads to remove under each name."""
    if heads:
        if types != BACK:
            asked = Call("confirm", {"types": types, "heads": heads})
            raise Refused(asked, "named heads are of no type", "give one of the two")
        return {NAMED: components(model, heads)}
    asked = chosen(types)
    check_least("confirm", least)
    found = classify(model, prompts, least=least, eigenvalues=False, seed=seed)
    return {name: components(model, at) if (at := found.named(name)) else [] for name in (row.name for row in asked)}


def spans(tokens: Tokens, prompt: Int[Tensor, "row"]) -> list[Bool[Tensor, "row column"]]:
    """Return the columns whose next token was said before, and those of all other tokens.

    The first token of a sequence is none of them: nothing predicts it, and it alone predicts the next.
    """
    s, after = Sequences.of(tokens), tokens.ids.roll(-1, 1)
    asks = tokens.mask & tokens.mask.roll(-1, 1) & (s.query[..., 0] > 0)
    right = s.after_same & s.allowed & (s.back > 0) & (s.ids[:, None, :] == after[:, :, None])
    again = right.any(-1)
    return [asks & again, asks & ~again]


def few_such(n: int) -> str:
    """Return why a span of tokens that none or one of the sequences has is without an interval."""
    return f"{n or 'no'} sequence has such tokens"


def _result(sets: dict[str, list[Address]], found: Losses) -> TypeEffects:
    if not bool(found.count.sum()):
        raise Refused("the loss of predictions", "no sequence has three tokens", "give longer ones")
    few, why = dict[str, str](), found.why
    for name, n in zip(SPANS, (found.count > 0).sum(0).tolist(), strict=True):
        few |= {name: few_such(n)} if n < 2 else {}
    if why or few:
        few |= {name: few.get(name, "some types have no heads to remove") for name in SPANS if why}
        few["effect"] = "types without heads and tokens that no two sequences have say so"
    fields = {name.removeprefix("effect_"): x for name, x in found.fields.items()}
    return TypeEffects(
        **fields,
        removed=torch.tensor([len(places) for places in sets.values()]),
        labels={"span": SPANS, "type": list(sets), "bound": BOUNDS},
        units=_UNITS,
        reasons=few | why,
        record={
            "repeated tokens": int(found.count[:, 0].sum()),
            "loss with all heads": found.means(found.loss),
            "accuracy with all heads": found.means(found.hits),
            "heads": {name: [f"{a.layer}.{a.unit}" for a in places] for name, places in sets.items() if places},
            **found.said,
        },
    )
