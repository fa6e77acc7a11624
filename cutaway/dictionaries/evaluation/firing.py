"""How often does each latent fire, and how strongly?

`frequency`: share of tokens on which a latent is active (whatever the sign); `mean_active`: its mean value on those.
A latent is dead if it is active on none of the N tokens judged (N is in the record: a latent that fires less than about
3/N cannot be told from a dead one; Bricken et al. 2023), dense if it is active on more than `dense` of them.

Control: the density of random dictionaries with the same norms and L0. Cost: no forward; the dictionary and each random
one is run over the evidence once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.record import machine, versions
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, wilson, wilson_interval
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.controls import judge
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence
from cutaway.dictionaries.evaluation.reconstruction import over_units
from cutaway.dictionaries.evaluation.scores import Score, Scores, collect

DENSE = 0.1


@dataclass(frozen=True, kw_only=True)
class Firing(Result, kind="dictionary_firing"):
    """Frequency and strength of every latent, and how many latents fire how often.

    `density`: number of latents by log₁₀ frequency, dead ones in the first place. `mean_active` is NaN for the dead.
    """

    frequency: Float[Tensor, "latent"]
    frequency_interval: Float[Tensor, "latent bound"]
    mean_active: Float[Tensor, "latent"]
    largest: Float[Tensor, "latent"]
    density: Float[Tensor, "decade"]
    density_null: Float[Tensor, "decade sample"]


@method(
    answers="How often does each latent fire, and how strongly?",
    paper="Bricken et al. 2023, Towards Monosemanticity",
    cost="0",
    control="random_dictionary",
    rung="observational",
)
def firing(dictionary: Dictionary, evidence: Evidence, /, *, samples: int = 2, seed: int = 0) -> Firing:
    """Measure frequency, strength and density of every latent on held-out activations.

    Args:
        samples: number of random dictionaries that make the null of the density.
        seed: seed of the random dictionaries.

    Raises:
        Refused: evidence of other sites, or too little of it.
    """
    judged = judge(dictionary, evidence, samples, seed, fitted=False)
    return firing_of(judged.encoded, null=judged.null)


def firing_of(encoded: EncodedEvidence, *, null: Sequence[EncodedEvidence] = ()) -> Firing:
    """Measure frequency, strength and density of every latent, beside the density of random dictionaries."""
    tokens, fires = len(encoded.evidence), encoded.code.fires()
    code = encoded.code
    index, value = code.index.reshape(-1).cpu(), code.value.reshape(-1).double().cpu()
    total = torch.zeros(code.n_latents, dtype=torch.double).index_add_(0, index, value)
    largest = torch.zeros(code.n_latents).scatter_reduce_(0, index, value.float().abs(), "amax")
    edges = [-5.0 + 0.5 * i for i in range(11)]
    return Firing(
        frequency=fires / tokens,
        frequency_interval=wilson_interval(fires.double() / tokens, tokens).float(),
        mean_active=(total / fires).float(),
        largest=largest,
        density=_density(fires, tokens, edges),
        density_null=torch.stack([_density(n.code.fires(), len(n.evidence), edges) for n in null], -1)
        if null
        else torch.full((len(edges) + 1, 0), math.nan),
        labels={"decade": ["dead", *(f"10^{e:g}" for e in edges)], "bound": BOUNDS},
        units={
            "frequency": "probability",
            "frequency_interval": "probability",
            "mean_active": "activation",
            "largest": "activation",
            "density": "latents",
            "density_null": "latents",
        },
        record={
            "tokens": tokens,
            "dictionary": encoded.dictionary.fingerprint(),
            "versions": versions(),
            "machine": machine(),
            "interval": "Wilson score interval, tokens taken as independent",
        },
    )


def firing_scores(
    encoded: EncodedEvidence,
    *,
    null: Sequence[EncodedEvidence] = (),
    control: Mapping[str, EncodedEvidence] | None = None,
    dense: float = DENSE,
) -> Scores:
    """Measure the shares of dead and of dense latents, and the mean of log₁₀ frequency of the living."""
    rows = _scores(encoded, dense)
    random = [_scores(s, dense) for s in null]
    others = {n: _scores(s, dense) for n, s in (control or {}).items()}
    rows = [s.against([r[i] for r in random], {n: o[i] for n, o in others.items()}) for i, s in enumerate(rows)]
    how = "Wilson over latents, on these tokens; with more tokens fewer latents are dead"
    record = {"dead after tokens": len(encoded.evidence), "dense above": dense, "interval of shares": how}
    return collect(rows, {"dictionary": encoded.dictionary.fingerprint(), **record})


def _scores(encoded: EncodedEvidence, dense: float) -> list[Score]:
    frequency = encoded.code.fires().double().cpu() / len(encoded.evidence)
    living = frequency > 0
    n, silent, many = len(frequency), int((~living).sum()), int((frequency > dense).sum())
    name = "log₁₀ frequency"
    return [
        Score("dead", silent / n, wilson(silent, n), "share of latents"),
        Score("dense", many / n, wilson(many, n), "share of latents"),
        over_units(name, frequency[living].log10()) if bool(living.any()) else Score(name, math.nan),
    ]


def _density(fires: Tensor, tokens: int, edges: list[float]) -> Float[Tensor, "decade"]:
    log = (fires[fires > 0].double() / tokens).log10()
    place = torch.bucketize(log, torch.tensor(edges[1:], dtype=torch.double), right=True)
    counts = torch.bincount(place, minlength=len(edges)).float()
    return torch.cat([(fires == 0).sum().float()[None], counts])
