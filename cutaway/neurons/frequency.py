"""Which neurons write along the frequency of tokens, and do predictions move from it without them?

Token-frequency neurons (Stolfo et al. 2024, arXiv:2406.16254) raise or lower each token's logit in proportion to its
log frequency. Entropy neurons, which scale all logits, are those of `neurons.statistics`. With u the log unigram
distribution, its mean over tokens subtracted, and L the logits that a neuron's value v writes through the final norm:

* `score[neuron]`: the cosine between L, its mean subtracted, and u. Above 0: a positive activation favours what is
  frequent.
* `reach[neuron]`: by how many times u the logits move, one standard deviation of the activation over tokens, at the
  final norm's mean scale. Without `neurons`, the `top` of all `layers` by `reach`.
* `effect[measure, neuron]`: the change, with the neuron held at its mean over the tokens (first and special tokens left
  in place), of `KL to unigram`, the KL divergence of predictions from the unigram distribution, and of their `entropy`;
  in nats, mean over `tokens` places of each prompt. A KL above 0: the neuron kept predictions near the unigram
  distribution. `untouched`: without an edit.
* `direct[mediator, measure, neuron]`: `effect` with the `final norm's scale` held at its value without the edit, or the
  logits' `unigram component`, their product with u. `mediated`: effect − direct, the part that goes through what was
  held. An entropy neuron acts through the scale, a token-frequency neuron through the component.
* Every second prompt gives the unigram distribution, the means and the choice; `effect` is of the others. With one
  prompt, both are it.
* The unigram distribution is the mean of the model's own predictions at these places (`predicted`), or the count of
  tokens in the prompts, each counted once more (`counted`).
* `…_interval`: 95 %, over prompts. Control: `null` is the `score` of random mixes of the layer's other values;
  `effect_null`, `direct_null` and `mediated_null` take the same activation out along such a mix, of the same norm as v.
* Assumption: what a neuron does goes straight to the logits. `effect` counts also what later layers make of it.
* Known failures: few prompts give a unigram distribution of their topics. A neuron may have a high `score` and hardly
  fire: read `reach`. Neurons that stand in for each other hide each other.
* Equivalence (test): `direct` with the scale held is the effect under `Freeze("final.scale", …)`.
* Cost: two forwards, and 1 + samples for each neuron, each with the unembedding of `tokens` places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.interventions.ablation_values import SINKS, without_sinks
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.access.reading import Measure
from cutaway.models.anatomy.weights import unembed_rows
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edit import Edit, at_places
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens, halves
from cutaway.models.watching import watched
from cutaway.neurons import memories
from cutaway.neurons.contributions import divisor
from cutaway.neurons.memories import Neuron
from cutaway.neurons.predictions import MEASURES, MEDIATORS, Predictions, read_out, way_of
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.prompts import Prompts

_CELLS = 1 << 24  # most logits that are made at once
_WEIGHTS = "it is of the weights and one unigram distribution, which have no spread over prompts"
Unigram = Literal["predicted", "counted"]


@dataclass(frozen=True, kw_only=True)
class FrequencyNeurons(Result, kind="frequency_neurons"):
    """Neurons that write along the log frequency of tokens, and predictions without them.

    Attributes:
        score: cosine between the logits that the neuron writes and the log unigram distribution.
        null: `score` of random mixes of the layer's other values.
        reach: multiple of the log unigram distribution that the neuron adds, for one standard deviation.
        effect: change of predictions with the neuron held at its mean.
        effect_interval: of `effect`, 95 %, over prompts.
        effect_null: `effect` of the same change along random mixes of the layer's values, of the same norm.
        direct: `effect` with the final norm's scale, or the logits' unigram component, as without the edit.
        mediated: the rest of `effect`, which goes through what was held.
        untouched: the measures without an edit.
    """

    score: Float[Tensor, "neuron"]
    null: Float[Tensor, "neuron sample"]
    reach: Float[Tensor, "neuron"]
    effect: Float[Tensor, "measure neuron"]
    effect_interval: Float[Tensor, "measure neuron bound"]
    effect_null: Float[Tensor, "measure neuron sample"]
    direct: Float[Tensor, "mediator measure neuron"]
    direct_interval: Float[Tensor, "mediator measure neuron bound"]
    direct_null: Float[Tensor, "mediator measure neuron sample"]
    mediated: Float[Tensor, "mediator measure neuron"]
    mediated_interval: Float[Tensor, "mediator measure neuron bound"]
    mediated_null: Float[Tensor, "mediator measure neuron sample"]
    untouched: Float[Tensor, "measure"]


@dataclass(frozen=True)
class AlongMix(Edit):
    """Change a layer's activations by what holds one neuron at its mean, if its value is a mix of the layer's.

    Attributes:
        address: `mlp_post` of the layer.
        neuron: the neuron.
        mean: its mean.
        mix: the weights of the mix; 1 at the neuron and 0 elsewhere holds the neuron itself.
        tokens: True at the tokens at which it acts.
    """

    address: Address | str
    neuron: int
    mean: float
    mix: Float[Tensor, "neuron"]
    tokens: Bool[Tensor, "batch position"]
    positions: None = None

    def select_prompts(self, prompts: BatchSlice) -> Edit:
        return replace(self, tokens=prompts.tensor(self.tokens, ["batch", "position"]))

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        def moved(old: Tensor) -> Tensor:
            step = (self.mean - old[..., self.neuron]) * self.tokens.to(old)
            return old + step[..., None] * self.mix.to(old)

        return at_places(self, x, frame, moved)


@method(
    answers="Which neurons write along the frequency of tokens, and do predictions move from it without them?",
    paper="Stolfo et al. 2024, arXiv:2406.16254",
    cost="prompts * (3 + neuron * (1 + samples)) * F",
    control="random_directions",
    rung="interventional",
)
def frequency(
    model: Model,
    prompts: Prompts,
    /,
    *,
    neurons: tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    top: int = 4,
    tokens: int = 8,
    unigram: Unigram = "predicted",
    samples: int = 5,
    seed: int = 0,
) -> FrequencyNeurons:
    """Find neurons that write along the log frequency of tokens, and hold them at their mean.

    Args:
        neurons: these, as `layer.neuron`: `3.17,5.2`; without, those of the largest reach.
        layers: without `neurons`, look only in these; everywhere if empty.
        top: how many neurons in all.
        tokens: at how many places of each prompt predictions are measured, spread evenly.
        unigram: the mean of the model's predictions, or the counted tokens of the prompts.
        samples: how many random mixes make the nulls of each neuron.
        seed: of the mixes.

    Raises:
        Refused: no such neuron, an encoder, a model without dense MLPs, an unembedding that is not linear, or prompts
            of first and special tokens alone.
    """
    check_predicts(model)
    way_of(model)
    there, asked, bound = memories.dense_layers(model, layers), memories.named(model, neurons), prompts.bind(model)
    there = sorted({layer for layer, _ in asked}) or there
    first, second = (bound.rows(rows) for rows in halves(bound))
    places, held = (_places(t, max(tokens, 1)) for t in (first, second))
    seen = _Texts.of(model, first, there, places)
    log_p = seen.log_unigram(first, unigram)
    direction = _Direction.of(model, log_p)
    reach = torch.stack([seen.strength[at] * direction.slope(model, i).cpu() for at, i in enumerate(there)])
    chosen = asked or _largest(reach, there, max(top, 1))
    mixes = _mixes(model, chosen, samples, seed)
    score = torch.stack([direction.cosine(memories.toward_logits(model, _value(model, x))) for x in chosen])
    chance = torch.stack([direction.cosine(memories.toward_logits(model, made)) for made, _ in mixes])
    cell = [(there.index(layer), n) for layer, n in chosen]
    means = [float(seen.mean[at]) for at in cell]
    values = _measured(model, second, chosen, means, [w for _, w in mixes], Predictions.of(model, second, held, log_p))
    each = (values[1:] - values[:1]).unflatten(0, (len(chosen), 1 + samples))
    return FrequencyNeurons(
        score=score.float().cpu(),
        null=chance.float().cpu(),
        reach=torch.stack([reach[at] for at in cell]).abs().float(),
        **_paths(each.permute(2, 3, 4, 0, 1)),
        untouched=values[0, :, 0].mean(0),
        labels={
            "neuron": [memories.label(x) for x in chosen],
            "measure": MEASURES,
            "mediator": MEDIATORS,
            "bound": BOUNDS,
        },
        units={"score": "cosine", "null": "cosine", "reach": "log frequencies"}
        | {f"{name}{part}": "nats" for name in ("effect", "direct", "mediated") for part in ("", "_interval", "_null")}
        | {"untouched": "nats"},
        reasons={"score": _WEIGHTS} | one_prompt(len(second), "effect", "direct", "mediated"),
        record={
            "split": f"every second prompt gave the distribution and chose, measured on the other {len(second)}",
            "unigram": f"{unigram}: {int((places >= 0).sum())} places" if unigram == "predicted" else unigram,
            "layers": there,
            "held at": "the mean over the tokens of the prompts that chose",
            "left in place": SINKS,
        },
    )


def _paths(each: Float[Tensor, "prompt path measure neuron draw"]) -> dict[str, Any]:
    """Return the fields of effects by path, first the whole effect; the first draw is the neuron itself."""
    whole, direct, fields = each[:, 0], each[:, 1:], dict[str, Any]()
    for name, x in (("effect", whole), ("direct", direct), ("mediated", whole[:, None] - direct)):
        fields |= {name: x[..., 0].mean(0), f"{name}_interval": mean_interval(x[..., 0])}
        fields[f"{name}_null"] = x[..., 1:].mean(0)
    return fields


def _places(tokens: Tokens, n: int) -> Int[Tensor, "prompt place"]:
    """Return positions of every prompt, spread evenly from the second token to the last, filled up with −1."""
    rows = list[Tensor]()
    for length in tokens.lengths.tolist():
        first = min(1, length - 1)
        at = torch.linspace(first, length - 1, min(n, length - first)).round().long()
        rows.append(torch.cat([at, at.new_full((n - len(at),), -1)]))
    return torch.stack(rows)


@dataclass(frozen=True)
class _Texts:
    """Activations of neurons and predictions on some texts, from one forward.

    Attributes:
        mean: mean activation over the tokens without first and special ones.
        strength: standard deviation of the activation, over the divisors of the norms that its value goes through.
        predicted: mean of the predicted distributions.
    """

    mean: Float[Tensor, "layer neuron"]
    strength: Float[Tensor, "layer neuron"]
    predicted: Float[Tensor, "token"]

    @staticmethod
    @torch.no_grad()
    def of(model: Model, tokens: Tokens, layers: Sequence[int], places: Int[Tensor, "prompt place"]) -> _Texts:
        """Run the texts."""
        asked, where = _at(tokens, places), _ordinary(model, tokens).cpu()
        sums, n = dict[str, Tensor](), {"tokens": int(where.sum()), "asked": int(asked.sum())}
        final = model.anatomy.top("final")
        norm = model.anatomy.norm(final) if final is not None else None

        def add(name: str, x: Tensor) -> None:
            x = x.double().cpu() if x.device.type == "mps" else x.double()
            sums[name] = sums[name] + x if name in sums else x

        def neurons(layer: int, at: Bool[Tensor, "batch position"], x: Tensor) -> Tensor:
            m, acts = at.to(x.device).float(), x.detach().float()
            add(f"first {layer}", torch.einsum("bpn,bp->n", acts, m))
            add(f"second {layer}", torch.einsum("bpn,bp->n", acts.square(), m))
            if model.anatomy.part(layer, "ln2_post") is not None:
                add(f"norm {layer}", (m.flatten() / divisor(model, layer, acts.flatten(0, 1)).to(m.device)).sum())
            return x

        for rows in memories.batches(model, tokens):
            last = list[Tensor]()

            def stream(
                x: Tensor, at: Bool[Tensor, "batch position"] = asked[rows], last: list[Tensor] = last
            ) -> Tensor:
                last.append(x.detach()[at.to(x.device)])
                return x

            sees = {Address("mlp_post", i): partial(neurons, i, where[rows]) for i in layers}
            watched(model, tokens.rows(rows), {**sees, Address("resid_post", model.shape.n_layers - 1): stream})
            for some in last[0].split(max(1, _CELLS // model.shape.d_vocab)):
                add("predicted", read_out(model, some).softmax(-1).sum(0))
                add("scale", (1 / norm.scale(some)).sum() if norm is not None else torch.tensor(float(len(some))))
        found = {k: v.cpu() for k, v in sums.items()}
        mean = torch.stack([found[f"first {i}"] for i in layers]) / n["tokens"]
        second = torch.stack([found[f"second {i}"] for i in layers]) / n["tokens"]
        by = torch.stack([found.get(f"norm {i}", mean.new_tensor(n["tokens"])) / n["tokens"] for i in layers])
        spread = (second - mean.square()).clamp_min(0).sqrt()
        scale = found["scale"] / n["asked"]
        return _Texts(mean.float(), (spread * by[:, None] * scale).float(), (found["predicted"] / n["asked"]).float())

    def log_unigram(self, tokens: Tokens, how: Unigram) -> Float[Tensor, "token"]:
        """Return the log unigram distribution."""
        if how == "predicted":
            return self.predicted.clamp_min(torch.finfo(torch.float32).tiny).log()
        counts = torch.bincount(tokens.ids[tokens.mask].cpu(), minlength=len(self.predicted)) + 1
        return (counts / counts.sum()).log().float()


def _ordinary(model: Model, tokens: Tokens) -> Bool[Tensor, "batch position"]:
    """Return the tokens without first and special ones, where neurons are averaged and held.

    Raises:
        Refused: there is none.
    """
    where = without_sinks(model, tokens)
    if not bool(where.any()):
        raise Refused(
            "frequency neurons", "a half of the prompts has only first and special tokens", "give longer ones"
        )
    return where


def _at(tokens: Tokens, places: Int[Tensor, "prompt place"]) -> Bool[Tensor, "batch position"]:
    """Return a mask of some positions of every prompt."""
    columns = tokens.column(0).cpu()[:, None] + places
    out = torch.zeros(tokens.mask.shape, dtype=torch.bool)
    rows = torch.arange(len(places))[:, None].expand_as(places)
    out[rows[places >= 0], columns[places >= 0]] = True
    return out


@dataclass(frozen=True)
class _Direction:
    """The log unigram distribution, as directions of the stream meet it through the unembedding.

    Attributes:
        toward: product of the unembedding with u, for each dimension.
        gram: product of the unembedding's centred rows.
        length: ‖u‖.
    """

    toward: Float[Tensor, "d_model"]
    gram: Float[Tensor, "d_model d_model"]
    length: float

    @staticmethod
    def of(model: Model, log_p: Float[Tensor, "token"]) -> _Direction:
        """Multiply the unembedding out."""
        rows = unembed_rows(model.anatomy)[0].detach().float()
        rows = rows - rows.mean(0)
        u = (log_p - log_p.mean()).to(rows.device)
        return _Direction(u @ rows, rows.T @ rows, float(u.norm()))

    def cosine(self, v: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest"]:
        """Return the cosine between the logits of directions and u."""
        v = v.to(self.gram)
        size = ((v @ self.gram) * v).sum(-1).clamp_min(1e-30).sqrt()
        return (v @ self.toward) / (size * max(self.length, 1e-30))

    def slope(self, model: Model, layer: int) -> Float[Tensor, "neuron"]:
        """Return by how many times u the logits move with an activation of 1."""
        v = memories.toward_logits(model, memories.values(model, layer)).to(self.toward)
        return (v @ self.toward) / max(self.length**2, 1e-30)


def _largest(reach: Float[Tensor, "layer neuron"], layers: Sequence[int], top: int) -> list[Neuron]:
    order = reach.abs().flatten().topk(min(top, reach.numel())).indices.tolist()
    return [(layers[i // reach.shape[1]], i % reach.shape[1]) for i in order]


def _value(model: Model, neuron: Neuron) -> Float[Tensor, "d_model"]:
    return memories.values(model, neuron[0])[neuron[1]]


def _mixes(model: Model, chosen: Sequence[Neuron], samples: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return random mixes of other values of each neuron's layer, of its norm, and their weights [sample neuron]."""
    g, out = generator(seed), list[tuple[Tensor, Tensor]]()
    for layer, n in chosen:
        v = memories.values(model, layer)
        out.append(memories.mixed(v, v[n].norm().expand(samples), g, without=n))
    return out


def _measured(
    model: Model,
    tokens: Tokens,
    chosen: Sequence[Neuron],
    means: Sequence[float],
    mixes: Sequence[Tensor],
    readout: Predictions,
) -> Float[Tensor, "variant prompt path measure"]:
    """Return the measures without an edit, then for each neuron held at its mean and along each of its mixes."""
    variants, where = list[list[Edit]]([[]]), _ordinary(model, tokens)
    for (layer, n), mean, weights in zip(chosen, means, mixes, strict=True):
        own = torch.zeros_like(weights[:1])
        own[0, n] = 1
        variants += [[AlongMix(Address("mlp_post", layer), n, mean, w, where)] for w in (*own, *weights)]
    found = sweep(model, tokens, variants, Measure(readout.measures, readout.reads)).float().cpu()
    return found.unflatten(-1, (1 + len(MEDIATORS), len(MEASURES)))
