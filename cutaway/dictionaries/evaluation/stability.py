"""Do trainings with several seeds find the same latents?

PW-MCC: the mean |cosine| of the best one-to-one matching between the decoders of two dictionaries that differ in their
seed (Song et al. 2025, arXiv:2505.20254), for every pair. With many latents in few dimensions the matching of random
rows is far from 0.

Control: the same matching with random rows in the place of the other dictionary's. Cost: no forward; every pair is
matched 1 + samples times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.record import machine, versions
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.geometry import decoder_rows
from cutaway.dictionaries.evaluation.matching import matched, mcc, same_width
from cutaway.dictionaries.evaluation.scores import control_generator
from cutaway.dictionaries.subject import Dictionaries


@dataclass(frozen=True, kw_only=True)
class Stability(Result, kind="dictionary_stability"):
    """PW-MCC of every pair of dictionaries; 1 on the diagonal."""

    alike: Float[Tensor, "seed other"]
    alike_interval: Float[Tensor, "seed other bound"]
    alike_null: Float[Tensor, "seed other sample"]


@method(
    answers="Do trainings with several seeds find the same latents?",
    paper="Song et al. 2025, arXiv:2505.20254",
    cost="0",
    control="random_rows",
    rung="observational",
)
def stability(dictionaries: Dictionaries, /, *, samples: int = 2, seed: int = 0) -> Stability:
    """Match the latents of every two dictionaries one to one by direction.

    Args:
        samples: number of draws of random rows.
        seed: seed of the draws.

    Raises:
        Refused: fewer than two dictionaries, or ones that write other widths.
    """
    return stability_of(dictionaries, samples=samples, seed=seed)


def stability_of(dictionaries: Sequence[Dictionary], *, samples: int = 2, seed: int = 0) -> Stability:
    """Match the latents of every two dictionaries one to one by direction.

    Intervals: over matched pairs of latents. Null: each with random rows in the place of the other's.

    Raises:
        Refused: fewer than two dictionaries, or ones that write other widths.
    """
    if len(dictionaries) < 2:
        raise Refused(f"stability of {len(dictionaries)} dictionaries", "there is no pair", "give two or more")
    rows = [decoder_rows(d).cpu() for d in dictionaries]
    same_width(rows)
    n, g = len(rows), control_generator(seed)
    value, interval, null = torch.ones(n, n), torch.ones(n, n, 2), torch.ones(n, n, samples)
    for i in range(n):
        for j in range(i):
            near = matched(rows[i], rows[j])[2]
            value[i, j] = value[j, i] = near.mean()
            interval[i, j] = interval[j, i] = mean_interval(near, within=(0.0, 1.0))
            null[i, j] = null[j, i] = torch.tensor(
                [mcc(rows[i], torch.randn(rows[j].shape, generator=g)) for _ in range(samples)]
            )
    names = [str(d.about.get("seed", k)) for k, d in enumerate(dictionaries)]
    return Stability(
        alike=value,
        alike_interval=interval,
        alike_null=null,
        labels={"seed": names, "other": names, "bound": BOUNDS},
        units={"alike": "cosine", "alike_interval": "cosine", "alike_null": "cosine"},
        record={
            "dictionaries": [d.fingerprint() for d in dictionaries],
            "interval": "over matched pairs of latents",
            "versions": versions(),
            "machine": machine(),
        },
    )
