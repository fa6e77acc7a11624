"""Which tokens do neurons promote and suppress, and which tokens excite them?

An MLP is a key-value memory (Geva et al. 2021, arXiv:2012.14913): each neuron adds c·v to the stream, and through the
final norm and the unembedding v is a score for every token (Geva et al. 2022, arXiv:2203.14680). Its key, a column of
W_in, is held against every token's embedding (Dar et al. 2023, arXiv:2209.02535).

* `score[side, neuron]`: the mean over its `tokens` furthest tokens of |score − mean| / standard deviation over the
  vocabulary. Sides: the tokens that v `promotes` and `suppresses` (c above 0; below 0 they change places), and those
  whose embeddings the key `reads`; with a gate its two keys, `gate reads` and `linear reads`.
* `token`, `logit`: these tokens and their scores. Norms' weights are folded in and their scales left out, so scores of
  one neuron compare, those of two do not.
* `coefficient[neuron]`: c at the last token, mean over prompts; `update`: |c|·‖v‖ as a share of its layer's sum.
* Without `neurons`, the `top` of each layer by `update`: the dominant sub-updates of Geva et al.
* Control (`null`): random mixes of the layer's own values (or keys), of the same norm: its neurons in a rotated basis.
* Assumption: early values are read in the basis of the unembedding, late keys in that of the embedding. Where it fails,
  `score` stays within the null.
* Known failures: tokens that look alike are no proof of a meaning, and a value may work through later layers. A token
  that hardly any text has can be the furthest for many neurons.
* Cost: one forward, and one product of every chosen vector with the vocabulary, a block of them at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.models.anatomy.weights import unembed_rows
from cutaway.models.model import Model
from cutaway.neurons import memories
from cutaway.neurons.memories import Neuron
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.prompts import Prompts

_WRITES = ("promotes", "suppresses")
_WEIGHTS = "it is of the weights alone, which have no spread over prompts"
Furthest = tuple[Float[Tensor, "row rank"], Int[Tensor, "row rank"], Float[Tensor, "row rank"]]


@dataclass(frozen=True)
class Side:
    """Tokens that one side of some neurons has, the furthest first.

    Attributes:
        strength: distance of each token's score from the mean over the vocabulary, in standard deviations.
        token: ids of the tokens.
        logit: their scores.
        chance: `strength` of the tokens of random mixes of the layer's vectors, of the same norm.
    """

    strength: Float[Tensor, "neuron rank"]
    token: Int[Tensor, "neuron rank"]
    logit: Float[Tensor, "neuron rank"]
    chance: Float[Tensor, "neuron rank sample"]


@dataclass(frozen=True, kw_only=True)
class NeuronTokens(Result, kind="neuron_tokens"):
    """Tokens that single neurons promote, suppress and read.

    Attributes:
        score: how far the tokens of a side stand out of the vocabulary.
        null: `score` of random mixes of the layer's values or keys, of the same norm.
        token: ids of these tokens, the furthest first; the labels have their texts.
        logit: their scores.
        coefficient: activation of the neuron at the last token, mean over prompts.
        coefficient_interval: of `coefficient`, 95 %, over prompts.
        update: |coefficient| times the norm of the value, as a share of the layer's sum, mean over prompts.
        update_interval: of `update`, 95 %, over prompts.
    """

    score: Float[Tensor, "side neuron"]
    null: Float[Tensor, "side neuron sample"]
    token: Int[Tensor, "side neuron rank"]
    logit: Float[Tensor, "side neuron rank"]
    coefficient: Float[Tensor, "neuron"]
    coefficient_interval: Float[Tensor, "neuron bound"]
    update: Float[Tensor, "neuron"]
    update_interval: Float[Tensor, "neuron bound"]

    def words(self, neuron: str, side: str = "promotes") -> list[str]:
        """Return the tokens of a neuron on one side as texts, the furthest first.

        Raises:
            Refused: no such neuron or side.
        """
        return self.labels["token"][self._entries("side", side)[0]][self._entries("neuron", neuron)[0]]


@method(
    answers="Which tokens do neurons promote and suppress, and which tokens excite them?",
    paper="Geva et al. 2022, arXiv:2203.14680; Dar et al. 2023, arXiv:2209.02535",
    cost="prompts * F",
    control="rotated_neurons",
    rung="observational",
)
def values(
    model: Model,
    prompts: Prompts,
    /,
    *,
    neurons: tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    top: int = 4,
    tokens: int = 10,
    samples: int = 8,
    seed: int = 0,
) -> NeuronTokens:
    """Read single neurons' values and keys in the vocabulary.

    Args:
        neurons: these, as `layer.neuron`: `3.17,5.2`; without, those with the largest updates on the prompts.
        layers: without `neurons`, look only in these; everywhere if empty.
        top: how many neurons of each layer.
        tokens: how many tokens a side has.
        samples: how many random mixes make the null of each neuron.
        seed: of the mixes.

    Raises:
        Refused: no such neuron, an encoder, a model without dense MLPs, or an unembedding that is not linear.
    """
    check_predicts(model)
    there, asked = memories.dense_layers(model, layers), memories.named(model, neurons)
    there = sorted({layer for layer, _ in asked}) or there
    c = memories.coefficients(model, prompts.bind(model), there)  # [prompt, layer, neuron]
    share = memories.updates(model, c, there)
    chosen = asked or memories.strongest(share.mean(0), there, max(top, 1))
    sides = sides_of(model, chosen, max(tokens, 1), samples, generator(seed))
    at = (slice(None), [there.index(i) for i, _ in chosen], [n for _, n in chosen])
    words = [[model.text.token_texts(row) for row in side.token.tolist()] for side in sides.values()]
    return NeuronTokens(
        score=torch.stack([side.strength.mean(-1) for side in sides.values()]),
        null=torch.stack([side.chance.mean(1) for side in sides.values()]),
        token=torch.stack([side.token for side in sides.values()]),
        logit=torch.stack([side.logit for side in sides.values()]),
        coefficient=c[at].mean(0),
        coefficient_interval=mean_interval(c[at]),
        update=share[at].mean(0),
        update_interval=mean_interval(share[at], within=(0.0, 1.0)),
        labels={"side": [*sides], "neuron": [memories.label(n) for n in chosen], "token": words, "bound": BOUNDS},
        units={"score": "standard deviations", "null": "standard deviations", "update": "share of the layer's updates"},
        reasons={"score": _WEIGHTS} | one_prompt(len(c), "coefficient", "update"),
        record={"position": -1, "norms": "weights folded in, scales left out", "layers": there},
    )


def sides_of(model: Model, chosen: Sequence[Neuron], tokens: int, samples: int, g: torch.Generator) -> dict[str, Side]:
    """Return the sides of some neurons: `promotes`, `suppresses`, and those that `memories.keys` has.

    Raises:
        Refused: an unembedding that is not linear.
    """
    out = dict[str, Side]()
    embed, unembed = model.weights.embed.detach().float(), unembed_rows(model.anatomy)[0].detach().float()
    reads = {layer: memories.keys(model, layer) for layer in dict.fromkeys(i for i, _ in chosen)}
    for side in next(iter(reads.values())):
        found = {layer: x[side] for layer, x in reads.items()}
        (out[side],) = _read(found, chosen, embed, tokens, samples, g, ends=1)
    found = {layer: memories.toward_logits(model, memories.values(model, layer)) for layer in reads}
    writes = _read(found, chosen, unembed, tokens, samples, g, ends=2)
    return {**dict(zip(_WRITES, writes, strict=True)), **out}


def _read(
    vectors: dict[int, Float[Tensor, "neuron d_model"]],
    chosen: Sequence[Neuron],
    table: Float[Tensor, "token d_model"],
    tokens: int,
    samples: int,
    g: torch.Generator,
    ends: int,
) -> list[Side]:
    """Return the side of the chosen vectors at the top of the vocabulary, with two `ends` also that at its bottom."""
    own = torch.stack([vectors[layer][n] for layer, n in chosen])
    norms = own.norm(dim=-1)
    chance = torch.empty(len(chosen), samples, own.shape[1], device=own.device)
    for layer, x in vectors.items():
        mine = [i for i, (at, _) in enumerate(chosen) if at == layer]
        made, _ = memories.mixed(x, norms[mine].repeat_interleave(samples), g)
        chance[mine] = made.unflatten(0, (len(mine), samples))
    rows = torch.cat([own[:, None], chance], 1).flatten(0, 1)
    parts = [_furthest(some, tokens, ends) for some in memories.logits_of(rows, table)]
    out = list[Side]()
    for end in range(ends):
        strength, ids, logits = (
            torch.cat(x).cpu().unflatten(0, (-1, 1 + samples)) for x in zip(*(p[end] for p in parts), strict=True)
        )
        chance = strength[:, 1:].transpose(1, 2).contiguous()
        out.append(Side(strength[:, 0].clone(), ids[:, 0].clone(), logits[:, 0].clone(), chance))
    return out


def _furthest(logits: Float[Tensor, "row token"], tokens: int, ends: int) -> list[Furthest]:
    """Return strengths, tokens and logits of the top of the vocabulary, and of its bottom."""
    k = min(tokens, logits.shape[1])
    mean, spread = logits.mean(-1, keepdim=True), logits.std(-1, keepdim=True).clamp_min(1e-30)
    out = list[Furthest]()
    for sign in (1.0, -1.0)[:ends]:
        found = logits.topk(k, largest=sign > 0)
        out.append((sign * (found.values - mean) / spread, found.indices, found.values))
    return out
