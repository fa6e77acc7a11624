"""In which contexts do neurons fire most, and do other texts agree?

The contexts that excite a neuron's key most are its triggers (Geva et al. 2021, arXiv:2012.14913). Texts run batch by
batch, and of every neuron only the largest activations are kept. Every second text is held out.

* `activation[half, neuron, rank]`: the largest activations, with their contexts as labels: the tokens up to the one at
  which the neuron fires, which stands in ⟦ ⟧. Halves: texts that `chose` the triggers, and those `held out`.
* `share[neuron]`: the share of the held-out contexts that end in a token in which one of the chosen contexts ends.
  Near 1 for a neuron that fires at certain tokens; a neuron of a topic or a syntactic place has less.
* `agreement[neuron]`: the share of contexts, of both halves, whose next token is among the 10 that the value promotes
  (suppresses, with `sign="negative"`): key and value of one memory.
* `interval` and `agreement_interval`: 95 %, Wilson's, over contexts.
* Control (`null`, `agreement_null`): as many tokens of all texts, drawn at random.
* Without `neurons`, the `top` of each layer by their update at the last tokens, as in `neurons.values`.
* Assumption: texts are alike. One that is there twice counts once; near copies still share tokens between the halves.
* Known failures: the largest activations are no picture of the rest. Contexts of one text are not independent, so
  intervals are too narrow where one text has most of them. With a gate, c has both signs, which mean different things.
* First tokens, special tokens and last tokens, which have no next one, are left out; and contexts are at most a quarter
  of a half's tokens.
* Cost: two forwards, or one where neurons are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, wilson_interval
from cutaway.models.anatomy.weights import unembed_rows
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.neurons import contexts as contexts_
from cutaway.neurons import memories
from cutaway.neurons.contexts import HALVES, Units
from cutaway.neurons.memories import Neuron
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.prompts import Prompts

_PROMOTED = 10  # tokens of a value that the next token is looked for in


@dataclass(frozen=True, kw_only=True)
class NeuronTriggers(Result, kind="neuron_triggers"):
    """Contexts in which single neurons fire most.

    Attributes:
        share: held-out contexts that end in a token in which a chosen one ends.
        interval: of `share`, 95 %, over contexts.
        null: `share` of tokens drawn at random.
        activation: the largest activations; the labels have their contexts. NaN where there are fewer.
        agreement: contexts whose next token is among those that the value promotes.
        agreement_interval: of `agreement`, 95 %, over contexts.
        agreement_null: `agreement` of tokens drawn at random.
    """

    share: Float[Tensor, "neuron"]
    interval: Float[Tensor, "neuron bound"]
    null: Float[Tensor, "neuron sample"]
    activation: Float[Tensor, "half neuron rank"]
    agreement: Float[Tensor, "neuron"]
    agreement_interval: Float[Tensor, "neuron bound"]
    agreement_null: Float[Tensor, "neuron sample"]

    def contexts(self, neuron: str, half: str = "chose") -> list[str]:
        """Return the contexts of a neuron, the largest activations first.

        Raises:
            Refused: no such neuron or half.
        """
        return self.labels["activation"][self._entries("half", half)[0]][self._entries("neuron", neuron)[0]]


@method(
    answers="In which contexts do neurons fire most, and do other texts agree?",
    paper="Geva et al. 2021, arXiv:2012.14913",
    cost="2 * prompts * F",
    control="random_tokens",
    rung="observational",
)
def triggers(
    model: Model,
    prompts: Prompts,
    /,
    *,
    neurons: tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    top: int = 4,
    contexts: int = 10,
    sign: Literal["positive", "negative"] = "positive",
    samples: int = 20,
    seed: int = 0,
) -> NeuronTriggers:
    """Find the contexts that excite single neurons most, and hold them against other texts.

    Args:
        neurons: these, as `layer.neuron`: `3.17,5.2`; without, those with the largest updates at the last tokens.
        layers: without `neurons`, look only in these; everywhere if empty.
        top: how many neurons of each layer.
        contexts: how many contexts of each half, at most a quarter of its tokens.
        sign: the largest activations, or the smallest.
        samples: how many random draws of tokens make the null of each neuron.
        seed: of the draws.

    Raises:
        Refused: no such neuron, an encoder, a model without dense MLPs, or texts without a token between others.
    """
    check_predicts(model)
    tokens = contexts_.once(prompts.bind(model))
    chosen = memories.asked(model, tokens, neurons, layers, top)
    halves, flip = contexts_.halves(model, tokens), -1.0 if sign == "negative" else 1.0
    k = max(1, min(max(contexts, 1), contexts_.room(halves) // 4))
    found = _largest(model, tokens, chosen, halves, k, flip)
    return held_against(model, tokens, chosen, halves, found, flip, samples, seed)


def _largest(
    model: Model, tokens: Tokens, chosen: Sequence[Neuron], halves: Sequence[Tensor], k: int, flip: float
) -> tuple[Float[Tensor, "half rank neuron"], Int[Tensor, "half rank neuron"]]:
    """Return the largest activations of each half with their places; NaN and −1 where there are fewer."""
    here = memories.by_layer(chosen)

    def own(layer: int) -> Units:
        return lambda x: x[..., [chosen[n][1] for n in here[layer]]].float() * flip

    best = contexts_.largest(model, tokens, {i: own(i) for i in here}, halves, k)
    found = torch.empty(len(halves), k, len(chosen))
    places = torch.empty(len(halves), k, len(chosen), dtype=torch.long)
    for layer, mine in here.items():
        found[..., mine], places[..., mine] = best[layer].activation, best[layer].place
    return torch.where(places < 0, torch.nan, found * flip), places


def held_against(
    model: Model,
    tokens: Tokens,
    chosen: Sequence[Neuron],
    halves: Sequence[Bool[Tensor, "batch position"]],
    largest: tuple[Tensor, Tensor],
    flip: float,
    samples: int,
    seed: int,
) -> NeuronTriggers:
    """Return the triggers of neurons, from the largest activations of each half and their places, held against the
    other half and against tokens drawn at random; `flip` is −1 for the smallest activations.
    """
    g, (found, places), ids = generator(seed), largest, tokens.ids.cpu().flatten()
    k, held = found.shape[1], bool(halves[1].any())
    promoted = _promoted(model, chosen, flip)  # [neuron, token]
    pools = [h.flatten().nonzero()[:, 0] for h in halves]
    ends = ids[places[0]].T  # [neuron, rank]
    seen = torch.cat([*places[: 1 + held]]).T
    chance = _drawn(torch.cat(pools), (len(chosen), samples), seen.shape[1], g)
    share = torch.full((len(chosen),), torch.nan)
    null, bounds = torch.full((len(chosen), samples), torch.nan), torch.full((len(chosen), 2), torch.nan)
    if held:
        share = _among(ids[places[1]].T, ends)
        null, bounds = _among(ids[chance[..., :k]], ends[:, None]), wilson_interval(share.double(), k).float()
    agreement = _among(ids[seen + 1], promoted)
    return NeuronTriggers(
        share=share,
        interval=bounds,
        null=null,
        activation=found.transpose(1, 2).contiguous(),
        agreement=agreement,
        agreement_interval=wilson_interval(agreement.double(), seen.shape[1]).float(),
        agreement_null=_among(ids[chance + 1], promoted[:, None]),
        labels={
            "neuron": [memories.label(n) for n in chosen],
            "half": HALVES,
            "activation": contexts_.texts(model, tokens, places),
            "bound": BOUNDS,
        },
        units={"share": "share of contexts", "agreement": "share of contexts", "activation": "activation"},
        reasons={} if held else {"share": "one text, so that none is held out"},
        record={
            "split": f"every second text, {len(tokens)} in all: chosen on one half, measured on the other",
            "tokens": {name: len(pool) for name, pool in zip(HALVES, pools, strict=True)},
            "contexts": k,
        },
    )


def _among(ids: Int[Tensor, "*rest rank"], which: Int[Tensor, "*some token"]) -> Float[Tensor, "*rest"]:
    """Return the share of tokens that are among others."""
    return (ids[..., :, None] == which[..., None, :]).any(-1).float().mean(-1)


def _drawn(pool: Int[Tensor, "place"], shape: tuple[int, ...], k: int, g: torch.Generator) -> Int[Tensor, "*rest rank"]:
    """Return `k` different places of a pool, drawn at random, for every cell of a shape."""
    rows = [torch.randperm(len(pool), generator=g)[:k] for _ in range(shape[0] * shape[1])]
    return pool[torch.stack(rows)].unflatten(0, shape)


def _promoted(model: Model, chosen: Sequence[Neuron], flip: float) -> Int[Tensor, "neuron token"]:
    """Return the tokens that every value promotes when its neuron fires with a sign."""
    table = unembed_rows(model.anatomy)[0].detach().float()
    whole = {layer: memories.toward_logits(model, memories.values(model, layer)) for layer, _ in chosen}
    rows = torch.stack([whole[layer][n].to(table.device) for layer, n in chosen]) * flip
    k = min(_PROMOTED, len(table))
    return torch.cat([x.topk(k).indices.cpu() for x in memories.logits_of(rows, table)])
