"""Which heads find a needle in a long text when the model repeats what it says?

A needle (random tokens, or a sentence of the user's) lies in a text at several depths, and the end of the prompt asks
for it. A head retrieves a token of the answer where the model foresees that token and the head, at the position in
front of it, looks hardest at the same token in the needle (Wu et al. 2024, arXiv:2404.15574). The answer is given to
the model token by token; as long as its own are right, that is greedy generation.

* `score[layer, head]`: the share of the answer's tokens that a head retrieves, mean over prompts; `interval`: 95 %,
  over prompts. `attended`: the share at which it looks hardest at the right token, whatever the model foresees.
* Control (`null`, `attended_null`): in place of the right token, another token of the same needle, drawn at random.
* `claimed[layer, head]`: 1 where the interval of `score` lies above `least` and above the band of the null.
* `by_depth[depth, layer, head]`: `score` of the needles at each depth of the text. `answered[depth]`: the share of
  their answers' tokens that the model foresees. Where it foresees none, no head can retrieve any.
* `effect[span, size]`: rise of the loss, in nats, at the answer and at the text around the needle when the first
  `sizes` heads by their score are removed at once; `accuracy`: the share of these tokens that stay likeliest. Every
  second round of depths chose the heads, and the others measure. Control (`effect_null`, `accuracy_null`): random sets
  of other heads, as many of each layer where enough are left.
* `overlap[type]`: the share of claimed heads that `heads.classify` claims for prefix matching, or for induction, on
  random tokens said twice. Control (`overlap_null`): those heads exchanged at random within their layers.
* Assumption: the answer's token stands once in the needle; if it stands there twice, either will do.
* Known failures: the end of a random needle's prompt says its first tokens again, so that prefix matching finds it;
  sentences with a question are less alike. A head can look at the token and copy nothing: `effect` tells whether the
  set matters. Heads that look at the token in front of the right one retrieve nothing here.
* Equivalence (test): the shares under greedy generation, token by token, where the model's answer is right.
* Cost: 3 forwards, a classification, and one a set and random set on half of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, layer_band, mean_interval
from cutaway.heads.classify import classify
from cutaway.heads.losses import How, Losses, without
from cutaway.heads.types import check_least, ranked
from cutaway.interventions.components import components
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.anatomy import rope
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.models.watching import in_batches, watched
from cutaway.tasks.needles import DEPTHS, Hidden, Needles
from cutaway.tasks.repeats import Repeats

SPANS, TYPES = ["answer", "text around"], ("prefix matching", "induction")
_REPEATED = Repeats(16, 24)
_CELLS = 1 << 22  # most entries of one layer's patterns at once, unless one prompt has more
_SHARES = ("score", "interval", "null", "attended", "by_depth", "answered")
_UNITS = {
    **dict.fromkeys((*_SHARES, "attended_interval", "attended_null"), "share of the answer's tokens"),
    **dict.fromkeys(("by_depth_interval", "answered_interval"), "share of the answer's tokens"),
    **dict.fromkeys(("effect", "effect_interval", "effect_null"), "nats"),
    **dict.fromkeys(("accuracy", "accuracy_interval", "accuracy_null"), "share of tokens"),
    **dict.fromkeys(("overlap", "overlap_null"), "share of heads"),
}


@dataclass(frozen=True, kw_only=True)
class RetrievalHeads(Result, kind="retrieval_heads"):
    """Shares of the tokens of answers that heads find in a needle, and what the best of them do together.

    Attributes:
        score: the share of tokens that the model foresees and the head looks hardest at.
        interval: of `score`, 95 %, over prompts.
        null: `score` with another token of the needle in place of the right one.
        claimed: 1 for a retrieval head, 0 for others.
        attended: the share of tokens that the head looks hardest at.
        by_depth: `score` of needles at each depth.
        answered: the share of tokens that the model foresees.
        effect: rise of the loss without the first heads.
        accuracy: share of tokens that are likeliest without them.
        overlap: the share of claimed heads that are of a type that looks back.
    """

    score: Float[Tensor, "layer head"]
    interval: Float[Tensor, "layer head bound"]
    null: Float[Tensor, "layer head sample"]
    claimed: Float[Tensor, "layer head"]
    attended: Float[Tensor, "layer head"]
    attended_interval: Float[Tensor, "layer head bound"]
    attended_null: Float[Tensor, "layer head sample"]
    by_depth: Float[Tensor, "depth layer head"]
    by_depth_interval: Float[Tensor, "depth layer head bound"]
    answered: Float[Tensor, "depth"]
    answered_interval: Float[Tensor, "depth bound"]
    effect: Float[Tensor, "span size"]
    effect_interval: Float[Tensor, "span size bound"]
    effect_null: Float[Tensor, "span size sample"]
    accuracy: Float[Tensor, "span size"]
    accuracy_interval: Float[Tensor, "span size bound"]
    accuracy_null: Float[Tensor, "span size sample"]
    overlap: Float[Tensor, "type"]
    overlap_null: Float[Tensor, "type sample"]

    def named(self) -> list[str]:
        """Return the claimed heads as `layer.head`, the largest scores first."""
        return ranked(self.claimed, self.score, self.labels["layer"])


@method(
    answers="Which heads find a needle in a long text when the model repeats what it says?",
    paper="Wu et al. 2024, arXiv:2404.15574",
    cost="(16 + prompts * (3 + size * (1 + sample))) * F",
    control="other_tokens_of_the_needle",
    rung="interventional",
)
def retrieval(
    model: Model,
    needles: Needles,
    /,
    *,
    sizes: tuple[int, ...] = (1, 4, 16),
    how: How = "mean",
    least: float = 0.1,
    samples: int = 8,
    seed: int = 0,
) -> RetrievalHeads:
    """Score every head by the tokens that it finds in needles, and remove the best ones together.

    Args:
        sizes: how many heads are removed at once.
        how: what stands in for them.
        least: share of the tokens that a head must retrieve to be claimed.
        samples: how many draws of other tokens, and random sets of heads, make the nulls.
        seed: of these.

    Raises:
        Refused: a share that no head can pass, no head to remove, an encoder, a model without attention, or needles
            that do not suit the model.
    """
    check_least("retrieval", least, "tokens")
    if any(k < 1 for k in sizes):
        raise Refused(Call("retrieval", {"sizes": sizes}), "a set has at least one head", "ask for sets of 1 or more")
    if not model.family.causal:
        raise Refused(f"retrieval heads of {model.name}", "it is an encoder and says nothing", "use a causal model")
    layers = [a.layer for a in model.places("pattern") if a.layer is not None]
    found = _Found(model, needles.bind(model), layers, samples, seed)
    scores, names = found.scores(), list(map(str, sizes))
    scores["claimed"] = (scores["interval"][..., 0] > layer_band(scores["null"])[1].clamp_min(least)).float()
    removed, why = _removed(found, sizes, how, samples, seed)
    overlap, types = _overlap(model, scores["claimed"], samples, seed)
    heads = ranked(scores["claimed"], scores["score"], layers)
    why |= {"overlap": "it counts heads, and has no spread over prompts"}
    why |= {} if heads else {"overlap": "no head is claimed"}
    return RetrievalHeads(
        **scores,
        **removed.fields,
        **overlap,
        labels={
            "layer": layers,
            "depth": [f"{d:.0%}" for d in DEPTHS],
            "span": SPANS,
            "size": names,
            "type": list(TYPES),
            "bound": BOUNDS,
        },
        units=_UNITS,
        reasons=why | {"answered": "it is what the model itself does"},
        record={
            "controls": {"effect": "random_sets", "accuracy": "random_sets", "overlap": "exchanged_heads"},
            "heads": heads,
            "heads of types": types,
            "heads in order": [f"{a.layer}.{a.unit}" for a in found.order()[: max(sizes, default=0)]],
            "split": "every second round of depths chose the heads that are removed, measured on the others",
            "loss with all heads": removed.means(removed.loss),
            "accuracy with all heads": removed.means(removed.hits),
            **removed.said,
        },
    )


class _Found:
    """Looks of every head at the answers' tokens, and the tokens that the model foresees.

    Attributes:
        hidden: the prompts.
        inside: True where a prompt has a token of its answer.
        right: True where the model foresees it.
        looked: True where a head looks hardest at it in the needle; behind it, at other tokens per draw.
    """

    inside: Bool[Tensor, "prompt step"]
    right: Bool[Tensor, "prompt step"]
    looked: Bool[Tensor, "prompt step layer head draw"]

    def __init__(self, model: Model, hidden: Hidden, layers: Sequence[int], samples: int, seed: int):
        self.model, self.hidden, self.layers = model, hidden, layers
        self.inside, self.right = hidden.key >= 0, foreseen(model, hidden)
        at, ids = looked_at(model, hidden, layers), hidden.tokens.ids.cpu()
        key = hidden.key.clamp_min(0)
        start, size = hidden.start[:, None], (hidden.end - hidden.start)[:, None]
        steps = 1 + (torch.rand(*key.shape, samples, generator=generator(seed)) * (size[..., None] - 1)).long()
        other = start[..., None] + (key[..., None] - start[..., None] + steps) % size[..., None]
        rows = torch.arange(len(ids))[:, None, None, None]
        where = hidden.start[:, None, None, None], hidden.end[:, None, None, None]
        own = (at >= where[0]) & (at < where[1]) & (ids[rows, at] == ids.gather(1, key)[..., None, None])
        self.looked = torch.cat([own[..., None], at[..., None] == other[:, :, None, None]], -1)

    def scores(self) -> dict[str, Any]:
        """Return the fields of scores by head, and of what the model foresees."""
        found = self.of_prompts(self.looked & self.right[:, :, None, None, None])
        seen, said = self.of_prompts(self.looked), self.of_prompts(self.right)
        depths, unit = [self.hidden.depth == d for d in range(len(DEPTHS))], (0.0, 1.0)
        return {
            "score": found[..., 0].mean(0),
            "interval": mean_interval(found[..., 0], within=unit),
            "null": found[..., 1:].mean(0),
            "attended": seen[..., 0].mean(0),
            "attended_interval": mean_interval(seen[..., 0], within=unit),
            "attended_null": seen[..., 1:].mean(0),
            "by_depth": torch.stack([found[d, ..., 0].mean(0) for d in depths]),
            "by_depth_interval": torch.stack([mean_interval(found[d, ..., 0], within=unit) for d in depths]),
            "answered": torch.stack([said[d].mean() for d in depths]),
            "answered_interval": torch.stack([mean_interval(said[d], within=unit) for d in depths]),
        }

    def of_prompts(self, x: Bool[Tensor, "prompt step *rest"]) -> Float[Tensor, "prompt *rest"]:
        """Return the share of a prompt's steps at which something is so."""
        inside = self.inside.reshape(*self.inside.shape, *[1] * (x.ndim - 2))
        return (x & inside).sum(1) / inside.sum(1)

    def halves(self) -> tuple[list[int], list[int]]:
        """Return the prompts that choose heads, and those that measure: rounds of depths in turn."""
        rounds = torch.arange(len(self.inside)) // len(DEPTHS) % 2
        return (rounds == 0).nonzero()[:, 0].tolist(), (rounds == 1).nonzero()[:, 0].tolist()

    def order(self) -> list[Address]:
        """Return the heads that retrieve anything in the first half, the largest scores first."""
        found = self.of_prompts(self.looked[..., 0] & self.right[:, :, None, None])[self.halves()[0]].mean(0)
        names = ranked((found > 0).float(), found, self.layers)
        return components(self.model, names) if names else []


def looked_at(model: Model, hidden: Hidden, layers: Sequence[int]) -> Int[Tensor, "prompt step layer head"]:
    """Return the position that each head looks at hardest in front of every token of the answers."""
    tokens, done, parts = hidden.tokens, list[Sequence[int]](), list[Tensor]()
    for rows in in_batches(model, tokens, _CELLS // (model.shape.n_heads * tokens.ids.shape[1] ** 2)):
        seen, query = dict[int, Tensor](), hidden.answer[rows].clamp_min(0)
        sees = {Address("pattern", i): partial(_hardest, seen, query, i) for i in layers}
        watched(model, tokens.rows(rows), sees)
        done.append(rows)
        parts.append(torch.stack([seen[i] for i in layers], 2))
    return rope.in_order(done, parts)


def _hardest(seen: dict[int, Tensor], query: Int[Tensor, "row step"], layer: int, pattern: Tensor) -> Tensor:
    rows = torch.arange(len(query), device=pattern.device)[:, None]
    seen[layer] = pattern.detach()[rows, :, query.to(pattern.device)].argmax(-1).cpu()  # [row, step, head]
    return pattern


def foreseen(model: Model, hidden: Hidden) -> Bool[Tensor, "prompt step"]:
    """Return True where a token of an answer is the model's likeliest."""

    def hits(seen: Seen, prompt: Int[Tensor, "row"]) -> Float[Tensor, "row step"]:
        assert seen.activations is not None
        logits, ids = seen.activations["logits"], seen.activations.tokens.ids
        at = hidden.answer.to(ids.device)[prompt.to(ids.device)].clamp_min(0)
        rows = torch.arange(len(at), device=ids.device)[:, None]
        return (logits[rows, at].argmax(-1) == ids[rows, at + 1]).float()

    measure = Measure(hits, Reads(last_logits=False, places=(Address("logits"),)))
    return (sweep(model, hidden.tokens, [[]], measure)[0].cpu() > 0) & (hidden.answer >= 0)


def _removed(found: _Found, sizes: Sequence[int], how: How, samples: int, seed: int) -> tuple[Losses, dict[str, str]]:
    """Return what the first heads do together to the prompts that did not choose them, and why some sets do nothing."""
    order, measured = found.order(), found.hidden.rows(found.halves()[1])

    def spans(tokens: Tokens, prompt: Int[Tensor, "row"]) -> list[Bool[Tensor, "row column"]]:
        places = (measured.start, measured.end, measured.asks)
        start, end, asks = (x.to(prompt.device)[prompt][:, None] for x in places)
        after = torch.arange(1, tokens.ids.shape[1] + 1, device=prompt.device)  # the token that each column foresees
        answer = (after == 1 + measured.answer.to(prompt.device)[prompt][..., None]).any(1)
        return [answer, (after > 1) & (after < asks) & ((after < start) | (after >= end))]

    sets = {str(k): order[:k] if len(order) >= k else [] for k in sizes}
    none = f"{len(order) or 'no'} heads retrieve a token of the first half"
    lost = without(found.model, measured.tokens, sets, spans, how, samples, seed, none)
    why = dict(lost.why)
    return lost, why | (dict.fromkeys(("effect", *SPANS), "some sets are not there, and say so") if why else {})


def _overlap(
    model: Model, claimed: Float[Tensor, "layer head"], samples: int, seed: int
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return how many of the claimed heads are of types that look back, and the heads of those types."""
    types = classify(model, _REPEATED, types=TYPES, eigenvalues=False, samples=samples, seed=seed)
    g, n = generator(seed), claimed.sum()
    drawn = torch.stack([torch.rand(claimed.shape, generator=g).argsort(-1) for _ in range(samples)])
    exchanged = (
        types.claimed[None].expand(samples, -1, -1, -1).gather(-1, drawn[:, None].expand(-1, len(TYPES), -1, -1))
    )
    fields = {
        "overlap": (types.claimed * claimed).sum((-1, -2)) / n,
        "overlap_null": (exchanged * claimed).sum((-1, -2)).T / n,
    }
    return fields, {name: types.named(name) for name in TYPES}
