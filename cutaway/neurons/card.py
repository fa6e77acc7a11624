"""What does one neuron do, from where it fires least to where it fires most?

The page of one neuron, a memory with a key and a value (Geva et al. 2021, arXiv:2012.14913; Geva et al. 2022,
arXiv:2203.14680). One forward over texts gives its activation c at every token; first, special and last tokens, which
have no next one, are left out. Tokens are ranked by c, for the largest activations alone flatter any description (as in
`heads.card`). With a gate, both ends mean something.

* `effect[span]`: rise of the loss, in nats, with the neuron at its mean over the tokens, at the tokens of its largest
  and smallest decile and of those between. `effect_interval`: 95 %, over texts.
* `window[context, offset]`: activations around the largest and the smallest ones of single texts, with their tokens.
* `activation[example]`: single tokens, evenly spaced in rank within every decile; the labels have the decile and the
  context, the token in ⟦ ⟧.
* `strength[decile]`: the mean activation of its tokens; `quantile[quantiles]`: exact ones, with the interval of their
  order statistics. `density[above]`: the share of tokens with c above 0, and with |c| above a tenth of its largest.
* `share[end]`, `agreement[end]`: those of `neurons.triggers`, for the largest and the smallest activations: do other
  texts agree on the token, and is the next one among those that the value promotes (suppresses)?
* `promotes[promoted]`, `suppresses[suppressed]`: the tokens of `neurons.values` that the value writes, in standard
  deviations over the vocabulary; `reads[read]`, `gate_reads[gate_read]`: those whose embeddings the keys read.
* `neighbour[neighbours]`: cosines with the nearest values, and keys, of all layers. `score[statistic]`: those of
  `neurons.statistics`. `norm[vector]`: lengths of value and keys.
* Control: random other neurons of the layer (`effect`, each at its own deciles; `strength`, `quantile`, `density`,
  `norm`); random tokens (`share`, `agreement`); random mixes of the layer's vectors, of the same norm (`promotes`,
  `suppresses`, `reads`, `gate_reads`, `neighbour`: those of the same rank), and a rotated stream (`score`).
* Known failures: a neuron need not be a unit of meaning (`neurons.polysemanticity`), and one that others stand in for
  has a small `effect`. Tokens of one text are no independent examples: intervals of `quantile`, `share` and
  `agreement` are too narrow where one text has most of them. A text that is there twice counts once.
* Cost: four forwards and one a random neuron, those without a neuron from its layer on, and products of some vectors
  with the vocabulary and with all neurons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.method import method
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, DECILES, generator, of_each_decile, one_prompt, quantiles, ratio_interval
from cutaway.interventions.ablation_values import SINKS
from cutaway.models.model import Model
from cutaway.neurons import contexts as contexts_
from cutaway.neurons import memories
from cutaway.neurons.firing import SPANS, Firing
from cutaway.neurons.memories import Neuron
from cutaway.neurons.statistics import STATISTICS, measured
from cutaway.neurons.triggers import held_against
from cutaway.neurons.values import sides_of
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.prompts import Prompts

ENDS = {"largest": 1.0, "smallest": -1.0}
ABOVE = ["above 0", "above max / 10"]
SHARES = (0.01, 0.1, 0.5, 0.9, 0.99)
_AROUND = (8, 5)  # tokens in front of a token and behind it that are shown
_TRIGGERS = 10  # most contexts of each half that triggers are taken from
_NEIGHBOURS = 4  # of the value and of each key
#: sides of `neurons.values`: the field and the axis of each
_SIDES = {
    "promotes": ("promotes", "promoted"),
    "suppresses": ("suppresses", "suppressed"),
    "reads": ("reads", "read"),
    "linear reads": ("reads", "read"),
    "gate reads": ("gate_reads", "gate_read"),
}
Part = tuple[dict[str, Any], dict[str, list[Any]], dict[str, str]]  # fields, their labels, reasons
_CONTROLS = {
    **dict.fromkeys(("effect", "strength", "quantile", "density", "norm"), "random_neurons"),
    **dict.fromkeys(("share", "agreement"), "random_tokens"),
    **dict.fromkeys(("promotes", "suppresses", "reads", "gate_reads", "neighbour"), "random_mixes"),
    "score": "rotated_neurons_and_stream",
}
_UNITS = {
    **dict.fromkeys(("window", "activation", "strength", "quantile"), "activation"),
    **dict.fromkeys(("promotes", "suppresses", "reads", "gate_reads"), "standard deviations over the vocabulary"),
    **dict.fromkeys(("effect", "effect_interval", "effect_null"), "nats"),
    **dict.fromkeys(("share", "agreement"), "share of contexts"),
    "density": "share of tokens",
    "neighbour": "cosine",
    "score": "as named",
    "logit variance": "cosine²",
    "null space": "share of length",
}


@dataclass(frozen=True, kw_only=True)
class NeuronCard(Result, kind="neuron_card"):
    """The page of one neuron.

    Attributes:
        effect: rise of the loss with the neuron at its mean.
        window: activations around single tokens; NaN beyond the text. The labels have the tokens.
        activation: activations of single tokens of every decile; the labels have their contexts.
        strength: the mean activation of a decile's tokens.
        quantile: quantiles of the activation.
        density: share of tokens at which the neuron fires.
        share: held-out contexts that end in a token in which a chosen one ends.
        agreement: contexts whose next token is among those that the value promotes, or suppresses.
        promotes: strengths of the tokens that the value promotes most.
        suppresses: strengths of those that it suppresses most.
        reads: strengths of the tokens whose embeddings the key reads most.
        gate_reads: the same of the gate's key; None without a gate.
        neighbour: cosines with the nearest values and keys.
        score: statistics of the value.
        norm: lengths of the value and the keys.
        neuron: the neuron.
    """

    page = ("window", "activation", "strength", "share", "promotes", "suppresses", "gate_reads", "reads", "neighbour")

    effect: Float[Tensor, "span"]
    effect_interval: Float[Tensor, "span bound"]
    effect_null: Float[Tensor, "span sample"]
    window: Float[Tensor, "context offset"]
    activation: Float[Tensor, "example"]
    strength: Float[Tensor, "decile"]
    strength_interval: Float[Tensor, "decile bound"]
    strength_null: Float[Tensor, "decile sample"]
    quantile: Float[Tensor, "quantiles"]
    quantile_interval: Float[Tensor, "quantiles bound"]
    quantile_null: Float[Tensor, "quantiles sample"]
    density: Float[Tensor, "above"]
    density_interval: Float[Tensor, "above bound"]
    density_null: Float[Tensor, "above sample"]
    share: Float[Tensor, "end"]
    share_interval: Float[Tensor, "end bound"]
    share_null: Float[Tensor, "end sample"]
    agreement: Float[Tensor, "end"]
    agreement_interval: Float[Tensor, "end bound"]
    agreement_null: Float[Tensor, "end sample"]
    promotes: Float[Tensor, "promoted"]
    promotes_null: Float[Tensor, "promoted sample"]
    suppresses: Float[Tensor, "suppressed"]
    suppresses_null: Float[Tensor, "suppressed sample"]
    reads: Float[Tensor, "read"]
    reads_null: Float[Tensor, "read sample"]
    gate_reads: Float[Tensor, "gate_read"] | None = None
    gate_reads_null: Float[Tensor, "gate_read sample"] | None = None
    neighbour: Float[Tensor, "neighbours"]
    neighbour_null: Float[Tensor, "neighbours sample"]
    score: Float[Tensor, "statistic"]
    score_null: Float[Tensor, "statistic sample"]
    norm: Float[Tensor, "vector"]
    norm_null: Float[Tensor, "vector sample"]
    neuron: str


@method(
    answers="What does one neuron do, from where it fires least to where it fires most?",
    paper="Geva et al. 2021, arXiv:2012.14913; Geva et al. 2022, arXiv:2203.14680",
    cost="prompts * (4 + sample) * F",
    control="random_neurons",
    rung="interventional",
)
@torch.no_grad()
def card(
    model: Model,
    prompts: Prompts,
    /,
    *,
    neuron: str = "",
    examples: int = 2,
    contexts: int = 4,
    tokens: int = 8,
    samples: int = 8,
    seed: int = 0,
) -> NeuronCard:
    """Make the page of one neuron.

    Args:
        neuron: the neuron, as `layer.neuron`: `3.17`.
        examples: how many tokens of every decile are shown.
        contexts: how many texts show their largest activation, and as many their smallest.
        tokens: how many tokens that the neuron promotes, suppresses and reads are shown.
        samples: how many draws make each null.
        seed: of the draws.

    Raises:
        Refused: not one neuron, texts without a token between others, or what `neurons.values` refuses.
    """
    check_predicts(model)
    place, g = _one(model, neuron), generator(seed)
    texts = contexts_.once(prompts.bind(model))
    firing = Firing.of(model, texts, place, samples, seed)
    parts = [_effects(model, firing), _windows(model, firing, max(contexts, 1))]
    parts += [_examples(model, firing, max(examples, 1)), _numbers(firing)]
    triggers, split = _triggers(model, firing, samples, seed)
    parts.append(triggers)
    parts += [_sides(model, place, max(tokens, 1), samples, g), _neighbours(model, place, samples, g)]
    parts += [_statistics(model, place, firing, samples, g)]
    fields, labels, reasons = {}, {"bound": BOUNDS}, {}
    for more, names, why in parts:
        fields, labels, reasons = fields | more, labels | names, reasons | why
    return NeuronCard(
        neuron=memories.label(place),
        **fields,
        labels=labels,
        units=_UNITS,
        reasons=reasons | one_prompt(len(texts), "effect", "strength", "density"),
        record={
            "tokens": int(firing.where.sum()),
            "texts": len(texts),
            "split": f"share: {split}",
            "controls": _CONTROLS,
            "left in place": SINKS,
            "random neurons": [memories.label(n) for n in firing.neurons[1:]],
        },
    )


def _one(model: Model, neuron: str) -> Neuron:
    form = "write one as layer.neuron, such as 3.17; neurons.values finds neurons"
    if not neuron:
        raise Refused("the page of no neuron", "it is about one neuron", form)
    found = memories.named(model, [neuron])
    if len(found) != 1:
        raise Refused(Call("card", {"neuron": neuron}), f"these are {len(found)} neurons", form)
    return found[0]


def _effects(model: Model, firing: Firing) -> Part:
    effect, interval, null = firing.without(model)
    few = f"{firing.values.shape[1]} tokens do not fill every decile"
    why = {name: few for name, x in zip(SPANS, effect.tolist(), strict=True) if math.isnan(x)}
    fields = {"effect": effect, "effect_interval": interval, "effect_null": null}
    return fields, {"span": SPANS}, {"effect": few} | why if why else {}


def _windows(model: Model, firing: Firing, number: int) -> Part:
    """Return activations around the largest and the smallest of single texts; the smallest only below 0."""
    before, behind = _AROUND
    offsets, (texts, width) = range(-before, behind + 1), firing.where.shape
    rows, words, names = list[Tensor](), list[list[str]](), list[str]()
    padded = torch.nn.functional.pad(
        firing.acts[0].masked_fill(~firing.tokens.mask.cpu(), math.nan), _AROUND, value=math.nan
    )
    for name, flip in ENDS.items():
        hardest = (firing.acts[0] * flip).masked_fill(~firing.where, -math.inf).max(1)
        for row in hardest.values.argsort(descending=True, stable=True)[: min(number, texts)].tolist():
            size, at = float(hardest.values[row]) * flip, int(hardest.indices[row])
            if not math.isfinite(size) or (flip < 0 and size >= 0):
                continue
            rows.append(padded[row, at : at + len(offsets)])
            words.append(_words(model, firing, row, [at + o for o in offsets]))
            names.append(f"{name}: {contexts_.text(model, firing.tokens, row * width + at)}")
    labels = {"context": names, "offset": [f"{o:+d}".replace("-", "−") if o else "0" for o in offsets], "window": words}
    return {"window": torch.stack(rows)}, labels, {"window": "single tokens have no interval and no null"}


def _words(model: Model, firing: Firing, row: int, columns: Sequence[int]) -> list[str]:
    """Return the tokens of a text at some columns; "" beyond it."""
    mask = firing.tokens.mask[row].tolist()
    there = [c for c in columns if 0 <= c < len(mask) and mask[c]]
    texts = dict(zip(there, model.text.token_texts(firing.tokens.ids[row, there], running=True), strict=True))
    return [texts.get(c, "") for c in columns]


def _examples(model: Model, firing: Firing, number: int) -> Part:
    places, found = firing.places.tolist(), of_each_decile(firing.values[0], number)
    names = [f"{decile}: {contexts_.text(model, firing.tokens, places[at])}" for decile, at in found]
    fields = {"activation": firing.values[0, [at for _, at in found]]}
    return fields, {"example": names}, {"activation": "single tokens have no interval and no null"}


def _numbers(firing: Firing) -> Part:
    """Return strengths by decile, quantiles and densities."""
    every, strength = firing.values, firing.strength()
    exact = [quantiles(x, SHARES) for x in every]
    fires = torch.stack([every > 0, every.abs() > every.abs().amax(1, keepdim=True) / 10], -1).float()
    sums, ones = firing.by_text(fires[0]), firing.by_text(torch.ones_like(fires[0]))
    fields = {
        **dict(zip(("strength", "strength_interval", "strength_null"), strength, strict=True)),
        "quantile": exact[0][0],
        "quantile_interval": exact[0][1],
        "quantile_null": torch.stack([x for x, _ in exact[1:]], 1),
        "density": fires[0].mean(0),
        "density_interval": ratio_interval(sums, ones, within=(0.0, 1.0)),
        "density_null": fires[1:].mean(1).T.contiguous(),
    }
    labels = {"decile": [str(i + 1) for i in range(DECILES)], "quantiles": [f"{q:g}" for q in SHARES], "above": ABOVE}
    few = f"{every.shape[1]} tokens do not fill every decile"
    empty = [name for name, x in zip(labels["decile"], strength[0].tolist(), strict=True) if math.isnan(x)]
    return fields, labels, dict.fromkeys(empty, few)


def _triggers(model: Model, firing: Firing, samples: int, seed: int) -> tuple[Part, str]:
    """Return what `neurons.triggers` says of both ends, and how it splits the texts."""
    k = max(1, min(_TRIGGERS, contexts_.room(firing.halves) // 4))
    both = [
        held_against(
            model, firing.tokens, firing.neurons[:1], firing.halves, firing.extremes(k, flip), flip, samples, seed
        )
        for flip in ENDS.values()
    ]
    names = {"share": "share", "share_interval": "interval", "share_null": "null"}
    names |= {n: n for n in ("agreement", "agreement_interval", "agreement_null")}
    fields = {mine: torch.cat([getattr(found, theirs) for found in both]) for mine, theirs in names.items()}
    return (fields, {"end": [*ENDS]}, both[0].reasons), both[0].record["split"]


def _sides(model: Model, neuron: Neuron, tokens: int, samples: int, g: torch.Generator) -> Part:
    fields, labels = dict[str, Any](), dict[str, list[Any]]()
    for name, side in sides_of(model, [neuron], tokens, samples, g).items():
        field, axis = _SIDES[name]
        fields |= {field: side.strength[0], f"{field}_null": side.chance[0]}
        labels[axis] = _distinct(model.text.token_texts(side.token[0]))
    return fields, labels, dict.fromkeys((n for n in fields if not n.endswith("_null")), "it is of the weights alone")


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, those that stand there twice with a number."""
    return [n if n not in names[:i] else f"{n} ({i + 1})" for i, n in enumerate(names)]


def _neighbours(model: Model, neuron: Neuron, samples: int, g: torch.Generator) -> Part:
    """Return the nearest values and keys of all layers, and those of random mixes."""
    (layer, own), vectors = neuron, dict[int, dict[str, Tensor]]()
    for i in memories.dense_layers(model):
        vectors[i] = {"value": memories.values(model, i), **memories.keys(model, i)}
    cosines, nulls, names = list[Tensor](), list[Tensor](), list[str]()
    for side, table in vectors[layer].items():
        norms = table[own].norm().repeat(samples)
        rows = normalize(torch.cat([table[own][None], memories.mixed(table, norms, g)[0]]), dim=-1)
        near = torch.cat([rows @ normalize(x[side], dim=-1).T for x in vectors.values()], 1).cpu()
        ids = [(i, n) for i, x in vectors.items() for n in range(len(x[side]))]
        near[0, ids.index(neuron)] = -math.inf
        best = near.topk(_NEIGHBOURS)
        cosines.append(best.values[0])
        nulls.append(best.values[1:].T)
        names += [f"{side} {memories.label(ids[j])}" for j in best.indices[0].tolist()]
    fields = {"neighbour": torch.cat(cosines), "neighbour_null": torch.cat(nulls)}
    return fields, {"neighbours": names}, {"neighbour": "it is of the weights alone"}


def _statistics(model: Model, neuron: Neuron, firing: Firing, samples: int, g: torch.Generator) -> Part:
    (layer, own), why = neuron, "it is of the weights alone"
    score, null, _, _ = measured(model, [layer], samples, g)
    vectors = {"value": memories.values(model, layer), **memories.keys(model, layer)}
    units = [n for _, n in firing.neurons]
    norms = torch.stack([x[units].norm(dim=-1).cpu() for x in vectors.values()])
    fields = {"score": score[:, 0, own], "score_null": null[:, 0, own], "norm": norms[:, 0], "norm_null": norms[:, 1:]}
    return fields, {"statistic": STATISTICS, "vector": [*vectors]}, {"score": why, "norm": why}
