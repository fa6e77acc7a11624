"""How well and how sparsely does a dictionary reconstruct?

* L0: mean number of active latents per token, negative values counted as active.
* FVU: Σ‖x − x̂‖² / Σ‖x − μ‖², one mean μ of all tokens, both sums over all tokens in float64; 1 − FVU is the explained
  variance. Not the mean of ratios per token, and not the variance about zero.
* norm ratio: mean of ‖x̂‖ / ‖x‖ (shrinkage below 1). relative bias: Σ‖x̂‖² / Σ x·x̂ (Rajamanoharan et al. 2024,
  arXiv:2404.16014): what x̂ would have to be divided by. cosine: mean of cos(x, x̂).

All are of the sites written, against their true values; special tokens are no evidence. Intervals: over groups of
tokens or sequences. Controls are fitted on a first quarter of the evidence, everything is judged on the rest.

Control: random dictionaries with the same norms and L0 (`null`), and what simpler ways reach with as many numbers per
token (`control`): principal components, single coordinates, the best affine map. Cost: no forward; the dictionary and
each of these is run over the evidence once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.stats import mean_interval, ratio_interval
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.controls import judge
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence
from cutaway.dictionaries.evaluation.scores import Score, Scores, collect

_ANY, _POSITIVE = (-math.inf, math.inf), (0.0, math.inf)  # where a score can lie


@method(
    answers="How well and how sparsely does a dictionary reconstruct?",
    paper="Rajamanoharan et al. 2024, arXiv:2404.16014",
    cost="0",
    control="random_dictionary",
    rung="observational",
)
def reconstruction(dictionary: Dictionary, evidence: Evidence, /, *, samples: int = 2, seed: int = 0) -> Scores:
    """Measure sparsity and reconstruction on held-out activations.

    Args:
        samples: number of random dictionaries that make the null.
        seed: seed of the random dictionaries.

    Raises:
        Refused: evidence of other sites, or too little of it.
    """
    judged = judge(dictionary, evidence, samples, seed)
    return reconstruction_scores(judged.encoded, null=judged.null, control=judged.control)


def reconstruction_scores(
    encoded: EncodedEvidence,
    *,
    null: Sequence[EncodedEvidence] = (),
    control: Mapping[str, EncodedEvidence] | None = None,
) -> Scores:
    """Score the sparsity and reconstruction of a dictionary, beside random dictionaries and controls.

    Args:
        encoded: the dictionary on its evidence.
        null: random dictionaries on evidence of the same tokens.
        control: other dictionaries by name, each on its own evidence.
    """
    own = _scores(encoded)
    random = [_scores(s) for s in null]
    others = {n: _scores(s) for n, s in (control or {}).items()}
    rows = [s.against([r[i] for r in random], {n: o[i] for n, o in others.items()}) for i, s in enumerate(own)]
    record = {
        "tokens": len(encoded.evidence),
        "interval": encoded.evidence.how,
        "dictionary": encoded.dictionary.fingerprint(),
    }
    return collect(rows, record)


def _scores(encoded: EncodedEvidence) -> list[Score]:
    """Return the scores of this family without controls, L0 first."""
    groups = encoded.evidence.groups
    found = [mean_score("L0", encoded.code.counts(), groups, "latents a token", _POSITIVE)]
    for site, out in encoded.output.items():
        x, name = encoded.evidence.of(site), "" if len(encoded.output) == 1 else f" of {site}"
        found += _of_site(x, out, groups, name)
    return found


def fvu(x: Float[Tensor, "token d"], reconstructed: Float[Tensor, "token d"]) -> float:
    """Compute the fraction of variance unexplained, about one mean, as a ratio of sums in float64."""
    wide = x.double()
    return float(((wide - reconstructed.double()) ** 2).sum() / ((wide - wide.mean(0)) ** 2).sum())


def _of_site(x: Tensor, out: Tensor, groups: Int[Tensor, "token"], name: str) -> list[Score]:
    mean = x.double().mean(0)
    error, spread, size, product, ratio, cosine = [], [], [], [], [], []
    for a, b in zip(x.split(4096), out.split(4096), strict=True):
        a, b = a.double(), b.double()
        error.append(((a - b) ** 2).sum(-1))
        spread.append(((a - mean) ** 2).sum(-1))
        size.append((b**2).sum(-1))
        product.append((a * b).sum(-1))
        lengths = a.norm(dim=-1), b.norm(dim=-1)
        ratio.append(lengths[1] / lengths[0])
        cosine.append(product[-1] / (lengths[0] * lengths[1]).clamp(min=1e-300))
    sums = [torch.cat(c) for c in (error, spread, size, product)]
    return [
        ratio_score(f"FVU{name}", sums[0], sums[1], groups, within=_POSITIVE),
        mean_score(f"norm ratio{name}", torch.cat(ratio), groups, within=_POSITIVE),
        ratio_score(f"relative bias{name}", sums[2], sums[3], groups),
        mean_score(f"cosine{name}", torch.cat(cosine), groups, within=(-1.0, 1.0)),
    ]


def by_group(values: Shaped[Tensor, "token"], groups: Int[Tensor, "token"]) -> Float[Tensor, "group"]:
    """Sum per-token values over each group, in float64; values that are not finite are left out."""
    values = values.double().cpu().nan_to_num(0.0, 0.0, 0.0)
    return torch.zeros(int(groups.max()) + 1, dtype=torch.double).index_add_(0, groups, values)


def mean_score(
    name: str,
    values: Shaped[Tensor, "token"],
    groups: Int[Tensor, "token"],
    unit: str = "",
    within: tuple[float, float] = _ANY,
) -> Score:
    """Average over tokens where the value is finite, with an interval over groups."""
    return ratio_score(name, values, torch.isfinite(values.double()), groups, unit, within)


def ratio_score(
    name: str,
    above: Shaped[Tensor, "token"],
    below: Shaped[Tensor, "token"],
    groups: Int[Tensor, "token"],
    unit: str = "",
    within: tuple[float, float] = _ANY,
) -> Score:
    """Divide sums over tokens, with an interval over groups."""
    a, b = by_group(above, groups), by_group(below, groups)
    value = float(a.sum() / b.sum()) if float(b.sum()) != 0 else float("nan")
    low, high = ratio_interval(a, b, within=within).tolist()
    return Score(name, value, (low, high), unit)


def over_units(name: str, values: Float[Tensor, "unit"], unit: str = "", within: tuple[float, float] = _ANY) -> Score:
    """Average over units such as latents or features, with an interval."""
    low, high = mean_interval(values, within=within).tolist()
    return Score(name, float(values.double().mean()), (low, high), unit)
