"""Which neurons write where the unembedding hardly reads, and is the stream's basis a privileged one?

Statistics of the values v of all neurons (rows of W_out), with the final norm's weight folded into the unembedding.

* `logit variance`: the variance over tokens of the cosine between v and a token's row. Entropy neurons (Stolfo et al.
  2024, arXiv:2406.16254) have a small one and a large `norm`: they scale all logits, through the final norm.
* `null space`: the share of v's length in the hundredth of the stream's directions that the unembedding reads least.
* `kurtosis`: the excess kurtosis of v's entries. Above that of a rotated basis, neurons write along single dimensions:
  the basis of the stream is privileged (Elhage et al. 2023, transformer-circuits.pub/2023/privileged-basis).
* `norm`: ‖v‖. `update`: |c|·‖v‖ at the prompts' last token as a share of its layer's sum; `update_interval`: 95 %.
* Control (`null`): random mixes of the layer's own values; for `kurtosis` the same values in a randomly rotated stream.
* Known failures: that a neuron writes into the null space does not show that it changes the entropy: ablate it. The
  statistics are of many neurons, of which some stand out by chance.
* Cost: one forward, and products of size d_model × d_model for each layer; no logits are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt, rotation
from cutaway.models.anatomy.weights import logit_readers
from cutaway.models.model import Model
from cutaway.neurons import memories
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.prompts import Prompts

STATISTICS = ["logit variance", "null space", "kurtosis"]
_LEAST_READ = 100  # the null space has one direction in a hundred of the stream's


@dataclass(frozen=True, kw_only=True)
class NeuronStatistics(Result, kind="neuron_statistics"):
    """Statistics of what every neuron writes.

    Attributes:
        score: the statistics.
        null: `score` of random mixes of the layer's values, or of the values in a rotated stream.
        norm: length of the value.
        update: |coefficient| times `norm`, as a share of the layer's sum, mean over prompts.
        update_interval: of `update`, 95 %, over prompts.
    """

    score: Float[Tensor, "statistic layer neuron"]
    null: Float[Tensor, "statistic layer neuron sample"]
    norm: Float[Tensor, "layer neuron"]
    update: Float[Tensor, "layer neuron"]
    update_interval: Float[Tensor, "layer neuron bound"]


@method(
    answers="Which neurons write where the unembedding hardly reads, and is the stream's basis a privileged one?",
    paper="Stolfo et al. 2024, arXiv:2406.16254; Elhage et al. 2023",
    cost="prompts * F",
    control="rotated_neurons_and_stream",
    rung="observational",
)
def statistics(
    model: Model, prompts: Prompts, /, *, layers: tuple[int, ...] = (), samples: int = 4, seed: int = 0
) -> NeuronStatistics:
    """Measure what the values of all neurons have in common with the unembedding and with the stream's basis.

    Args:
        layers: only these; all if empty.
        samples: how many random mixes and rotations make the null of each neuron.
        seed: of both.

    Raises:
        Refused: no such layer, an encoder, a model without dense MLPs, or an unembedding that is not linear.
    """
    check_predicts(model)
    there = memories.dense_layers(model, layers)
    share = memories.updates(model, memories.coefficients(model, prompts.bind(model), there), there)
    score, null, norms, rank = measured(model, there, samples, generator(seed))
    return NeuronStatistics(
        score=score,
        null=null,
        norm=norms,
        update=share.mean(0),
        update_interval=mean_interval(share, within=(0.0, 1.0)),
        labels={"statistic": STATISTICS, "layer": there, "bound": BOUNDS},
        units={"score": "as named", "logit variance": "cosine²", "null space": "share of length", "norm": "stream"},
        reasons={"score": "it is of the weights alone"} | one_prompt(len(share), "update"),
        record={"directions of the null space": rank, "norm": "final norm's weight folded in"},
    )


def measured(
    model: Model, layers: Sequence[int], samples: int, g: torch.Generator
) -> tuple[
    Float[Tensor, "statistic layer neuron"],
    Float[Tensor, "statistic layer neuron sample"],
    Float[Tensor, "layer neuron"],
    int,
]:
    """Return the statistics of all neurons of some layers, their null, the values' norms, and the rank of the null
    space.
    """
    reads = _read(model)
    turned = [rotation(model.shape.d_model, g).to(reads[0].device).double() for _ in range(samples)]
    score, null, norms = list[Tensor](), list[Tensor](), list[Tensor]()
    for layer in layers:
        v = memories.values(model, layer).to(reads[0].device).double()
        norms.append(v.norm(dim=-1).float().cpu())
        score.append(torch.cat([_written(v, reads), _kurtosis(v)[None]]))
        chance = []
        for basis in turned:
            mixes = memories.mixed(v.float(), norms[-1], g)[0].double()
            chance.append(torch.cat([_written(mixes, reads), _kurtosis(v @ basis)[None]]))
        null.append(torch.stack(chance, -1))
    whole = torch.stack(score, 1).float().cpu(), torch.stack(null, 1).float().cpu()
    return *whole, torch.stack(norms), reads[1].shape[1]


def _read(model: Model) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, "d_model rank"]]:
    """Return the covariance of the unembedding's rows, each of length 1, and the directions that it reads least."""
    rows = logit_readers(model.anatomy, dtype=torch.float32).detach()
    unit = (rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)).double()
    mean = unit.mean(0)
    least = max(1, len(mean) // _LEAST_READ)
    return unit.T @ unit / len(unit) - mean[:, None] * mean, torch.linalg.eigh((rows.T @ rows).double())[1][:, :least]


def _written(
    v: Float[Tensor, "neuron d_model"], reads: tuple[Float[Tensor, "d_model d_model"], Float[Tensor, "d_model rank"]]
) -> Float[Tensor, "two neuron"]:
    """Return the logit variance of vectors, and the share of their length that the unembedding reads least."""
    unit = v / v.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return torch.stack([((unit @ reads[0]) * unit).sum(-1), (unit @ reads[1]).norm(dim=-1)])


def _kurtosis(v: Float[Tensor, "neuron d_model"]) -> Float[Tensor, "neuron"]:
    """Return the excess kurtosis of the entries of every vector."""
    away = v - v.mean(-1, keepdim=True)
    return away.pow(4).mean(-1) / away.square().mean(-1).square().clamp_min(1e-300) - 3
