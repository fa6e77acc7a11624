"""Which heads turn a word into the one that comes next: Monday into Tuesday, three into four?

Successor heads (Gould et al. 2023, arXiv:2312.09230), read from weights. A word of an order (`heads.ordinals`: days,
months, numbers, number words, ordinals, letters) is embedded, goes through the first MLP alone, then through a head's
output circuit W_V W_O to the unembedding; the logits of the order's own words are compared.

* `score[order, layer, head]`: share of words whose largest logit is that of the word that follows; `interval`: 95 %,
  over words (Wilson). Control (`null`): the same with the order shuffled.
* `copies[order, layer, head]`: share of words whose largest logit is their own: such heads copy.
* `claimed[layer, head]`: 1 where over the words of all orders the interval of the share lies above `least` and above
  the band of the null (`overall`, with its own interval and null).
* `change`: what removing all claimed heads does to logit(next) − mean logit of the order's other words, behind three
  words in order ("Monday Tuesday Wednesday"), mean over prompts; a head is put at its mean z over the tokens (first and
  special tokens left in place). `change_null`: random sets of other heads, as many of each layer where enough are left
  (the record says how they are matched).
* Words of several tokens are left out; an order needs four of one token each.
* Assumption: the head reads the word where it stands, as the first MLP leaves it. Its query and key, and what later
  layers make of the word, play no part; biases, the same for every word, are left out.
* Known failures: an order of few words has wide intervals. A head can raise the next word and never look at words of
  orders; `change` tells whether the claimed ones matter where orders go on.
* Cost: one token of every word, and one forward a word (its prompt) and random set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, layer_band, mean_interval, share_interval
from cutaway.heads.ordinals import Order, orders
from cutaway.heads.types import check_least, ranked
from cutaway.interventions.ablation_values import SINKS, removals
from cutaway.interventions.components import all_components, random_heads
from cutaway.models import circuits
from cutaway.models.anatomy.weights import logit_readers
from cutaway.models.edits.library import Scale
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import as_prompts

_SHOWN = 3  # words in front of the one that is asked for
_UNITS = {
    **dict.fromkeys(("score", "interval", "null", "copies"), "share of words"),
    **dict.fromkeys(("overall", "overall_interval", "overall_null"), "share of words"),
    **dict.fromkeys(("change", "change_interval", "change_null"), "logits"),
}


@dataclass(frozen=True, kw_only=True)
class SuccessorHeads(Result, kind="successor_heads"):
    """Shares of words that each head's output circuit turns into the next of their order.

    Attributes:
        score: the share in each order.
        interval: of `score`, 95 %, over words.
        null: `score` with the order shuffled.
        copies: the share of words that the circuit turns into themselves.
        overall: the share over the words of all orders.
        claimed: 1 for a successor head, 0 for others.
        change: the change of the next word's logit over the others' without the claimed heads.
        word: the token of each word.
    """

    score: Float[Tensor, "order layer head"]
    interval: Float[Tensor, "order layer head bound"]
    null: Float[Tensor, "order layer head sample"]
    copies: Float[Tensor, "order layer head"]
    overall: Float[Tensor, "layer head"]
    overall_interval: Float[Tensor, "layer head bound"]
    overall_null: Float[Tensor, "layer head sample"]
    claimed: Float[Tensor, "layer head"]
    change: Float[Tensor, ""]
    change_interval: Float[Tensor, "bound"]
    change_null: Float[Tensor, "sample"]
    word: Int[Tensor, "word"]

    def named(self) -> list[str]:
        """Return the claimed heads as `layer.head`, the largest shares first."""
        return ranked(self.claimed, self.overall, self.labels["layer"])


@method(
    answers="Which heads turn a word into the one that comes next: Monday into Tuesday, three into four?",
    paper="Gould et al. 2023, arXiv:2312.09230",
    cost="word * (5 + sample) * F",
    control="shuffled_orders",
    rung="interventional",
)
def successor(model: Model, /, *, least: float = 0.3, samples: int = 8, seed: int = 0) -> SuccessorHeads:
    """Read from the weights which heads turn words into the next ones, and remove those together.

    Args:
        least: share of words that a head must turn into the next to be claimed.
        samples: how many shuffles and random sets of heads make the nulls.
        seed: of these.

    Raises:
        Refused: a share that no head can pass, an encoder, a model whose output circuits cannot be read, or one that
            has no words in an order as single tokens.
    """
    check_least("successor", least, "words")
    if not model.family.causal:
        raise Refused(f"successor heads of {model.name}", "it is an encoder: nothing follows", "use a causal model")
    places, known, g = all_components(model, mlps=False), orders(model), generator(seed)
    layers = list(dict.fromkeys(a.layer or 0 for a in places))
    hits, copies, chance = list[Tensor](), list[Tensor](), list[Tensor]()
    for order, chosen in zip(known, _chosen(model, places, known), strict=True):
        follows, n = torch.tensor(order.follows), len(order.ids)
        has = follows >= 0
        shuffles = [torch.randperm(n, generator=g) for _ in range(samples)]
        drawn = [torch.empty_like(p).scatter_(0, p, p.roll(-1)) for p in shuffles]  # the word behind each, shuffled
        hits.append((chosen == follows)[:, has])
        copies.append((chosen == torch.arange(n)).float().mean(1))
        chance.append(torch.stack([(chosen == other)[:, has] for other in drawn], -1))
    form = (len(layers), -1)
    every, null = torch.cat(hits, 1).float(), torch.cat(chance, 1).float().mean(1).reshape(*form, samples)
    overall_interval = share_interval(every.T).reshape(*form, 2)
    claimed = overall_interval[..., 0] > layer_band(null)[1].clamp_min(least)
    fields, why, matched = _removed(model, places, known, claimed, samples, seed)
    return SuccessorHeads(
        score=torch.stack([x.float().mean(1).reshape(form) for x in hits]),
        interval=torch.stack([share_interval(x.float().T).reshape(*form, 2) for x in hits]),
        null=torch.stack([x.float().mean(1).reshape(*form, samples) for x in chance]),
        copies=torch.stack([x.reshape(form) for x in copies]),
        overall=every.mean(1).reshape(form),
        overall_interval=overall_interval,
        overall_null=null,
        claimed=claimed.float(),
        **fields,
        word=torch.tensor([i for order in known for i in order.ids]),
        labels={
            "order": [order.name for order in known],
            "layer": layers,
            "word": [f"{order.name}: {w}" for order in known for w in order.words],
            "bound": BOUNDS,
        },
        units=_UNITS,
        reasons={"change": why} if why else {},
        record={
            "left in place": SINKS,
            "words": {order.name: len(order.ids) for order in known},
            "words that one follows": sum(f >= 0 for order in known for f in order.follows),
            **({} if why else {"random sets": matched}),
        },
    )


@torch.no_grad()
def _chosen(model: Model, places: list[Address], known: list[Order]) -> list[Int[Tensor, "head word"]]:
    """Return the word of the order with the largest logit behind each head, for every word of every order."""
    circuit, unembed = circuits.ov(model, places), logit_readers(model.anatomy).detach()
    ids = torch.tensor([[i] for order in known for i in order.ids])
    alone = model.capture(ids, ["resid_pre.0", "resid_post.0"], [Scale("attn_out.0", 0.0)], logits=False)
    first, later = (circuits.wide(alone[f"{site}.0"][:, 0]) for site in ("resid_pre", "resid_post"))
    begin = torch.tensor([a.layer == places[0].layer == 0 for a in places], device=first.device)
    out, start = list[Tensor](), 0
    for order in known:
        rows = slice(start, start + len(order.ids))
        start = rows.stop
        word = torch.tensor(order.ids, device=unembed.device)
        into = circuit.right @ circuits.wide(unembed[word]).to(circuit.right).T
        read = torch.where(begin[:, None, None], first[rows] @ circuit.left, later[rows] @ circuit.left)
        out.append((read @ into).argmax(-1).cpu())  # [head, word, word] before
    return out


def _removed(
    model: Model,
    places: list[Address],
    known: list[Order],
    claimed: Bool[Tensor, "layer head"],
    samples: int,
    seed: int,
) -> tuple[dict[str, Any], str, str]:
    """Return the fields of what removing the claimed heads does to the next word, or why that is not known, and how
    random sets are matched.
    """
    shapes = {"change": (), "change_interval": (2,), "change_null": (samples,)}
    nothing: dict[str, Any] = {name: torch.full(shape, math.nan) for name, shape in shapes.items()}
    heads = [a for a, one in zip(places, claimed.flatten().tolist(), strict=True) if one]
    if not heads:
        return nothing, "no head is claimed", ""
    random = random_heads(places, heads, samples, seed)
    if random.why:
        return nothing, random.why, ""
    made = _prompts(model, known)
    if made is None:
        return nothing, f"no order has {_SHOWN + 1} words in a row", ""
    tokens, right, others = made

    def metric(logits: Float[Tensor, "row token"], prompt: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        ids = others.to(logits.device)[prompt.to(logits.device)]
        mean = logits.float().gather(1, ids.clamp_min(0)).mul(ids >= 0).sum(1) / (ids >= 0).sum(1)
        return logits.float().gather(1, right.to(ids)[prompt.to(ids.device), None])[:, 0] - mean

    edits = removals(model, tokens, [heads, *random.sets], "mean")
    found = sweep(model, tokens, [[], *edits], metric).float().cpu()
    each = found[1:] - found[0]  # [set, prompt]
    fields = {"change": each[0].mean(), "change_interval": mean_interval(each[0]), "change_null": each[1:].mean(1)}
    return fields, "", random.matched


def _prompts(
    model: Model, known: list[Order]
) -> tuple[Tokens, Int[Tensor, "prompt"], Int[Tensor, "prompt other"]] | None:
    """Return prompts of three words in order, the word that comes next, and the others of its order (−1 fills up);
    None if no order has as many words in a row.
    """
    rows, right, others = list[list[int]](), list[int](), list[list[int]]()
    begin = model.tokens(["A"]).ids[0, 0].item()
    front = [int(begin)] if model.tokenizer is not None and begin == model.tokenizer.bos_token_id else []
    for order in known:
        for i in range(len(order.ids)):
            chain = [i]
            while len(chain) <= _SHOWN and order.follows[chain[-1]] >= 0:
                chain.append(order.follows[chain[-1]])
            if len(chain) > _SHOWN:
                *shown, last = (order.ids[k] for k in chain)
                rows.append([*front, *shown])
                right.append(last)
                others.append([k for k in order.ids if k != last])
    if not rows:
        return None
    width = max(map(len, others))
    filled = torch.tensor([[*row, *[-1] * (width - len(row))] for row in others])
    return as_prompts(rows).bind(model), torch.tensor(right), filled
