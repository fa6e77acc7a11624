"""Which concepts have one direction in the unembedding, and which directions are orthogonal?

A concept is given by pairs of words that differ in it (king, queen). Its direction is the mean difference of their
unembedding rows, in the causal inner product ⟨a, b⟩ = aᵀ Cov(γ)⁻¹ b, in which concepts that vary apart are orthogonal
(Park et al. 2023, arXiv:2311.03658).

* `alignment[concept]`: the cosine of each pair's difference with the direction of all other pairs (leave-one-out),
  averaged over pairs; `interval`: 95 %, over pairs.
* `cosine[concept, other]`: between directions. `plain_alignment` and `plain_cosine`: the same in the coordinates as
  stored, without the causal product.
* Control: as many pairs of tokens drawn at random from the vocabulary (`null`, `plain_alignment_null`), and the
  directions of such pairs beside each other (`cosine_null`, `plain_cosine_null`).
* Words of several tokens are left out. Concepts that share words (country with capital and with language) share parts
  of their directions.
* Known failures: random tokens are rarer than words; in the stored coordinates frequency moves all rows along one
  direction, so that plain cosines of any two concepts need not be small.
* Equivalence (test): with rows that are whitened already both products agree.
* Cost: no forward; one eigendecomposition of [d_model, d_model].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval
from cutaway.interventions.causal_product import CausalProduct
from cutaway.models.model import Model
from cutaway.tasks.concepts import Concepts

_UNITS: dict[str, str] = dict.fromkeys(("alignment", "plain_alignment", "cosine", "plain_cosine"), "cosine")


@dataclass(frozen=True, kw_only=True)
class ConceptDirections(Result, kind="concept_directions"):
    """Directions of concepts, how well pairs agree on them, and the cosines between them.

    Attributes:
        alignment: the mean leave-one-out cosine of a concept's pairs, in the causal product.
        interval: of `alignment`, 95 %, over pairs.
        null: `alignment` of random pairs of tokens.
        cosine: between the directions of concepts, in the causal product.
        cosine_null: between directions of random pairs of tokens.
        plain_alignment: `alignment` without the causal product.
        plain_alignment_null: the same of random pairs.
        plain_cosine: `cosine` without the causal product.
        plain_cosine_null: the same of random pairs.
        direction: the mean differences of unembedding rows, of length 1 in the causal product.
    """

    alignment: Float[Tensor, "concept"]
    interval: Float[Tensor, "concept bound"]
    null: Float[Tensor, "concept sample"]
    cosine: Float[Tensor, "concept other"]
    cosine_null: Float[Tensor, "concept other sample"]
    plain_alignment: Float[Tensor, "concept"]
    plain_alignment_null: Float[Tensor, "concept sample"]
    plain_cosine: Float[Tensor, "concept other"]
    plain_cosine_null: Float[Tensor, "concept other sample"]
    direction: Float[Tensor, "concept d_model"]


@method(
    answers="Which concepts have one direction in the unembedding, and which directions are orthogonal?",
    paper="Park et al. 2023, arXiv:2311.03658",
    cost="0",
    control="random_pairs_of_tokens",
    rung="observational",
)
def concepts(model: Model, concepts: Concepts, /, *, samples: int = 40, seed: int = 0) -> ConceptDirections:
    """Find the directions of concepts from counterfactual pairs of words, and compare them.

    Args:
        samples: number of draws of random pairs of tokens.
        seed: seed of the random pairs.

    Raises:
        Refused: no concept with three pairs of single tokens, no linear unembedding, or a vocabulary too small for it.
    """
    ids = concepts.ids(model)
    product = CausalProduct.of(model)
    pairs = [torch.tensor(own) for own in ids.values()]
    g = generator(seed)
    drawn = [[torch.randint(len(product.rows), p.shape, generator=g) for p in pairs] for _ in range(samples)]
    seen = [_compared(product, own, causal) for causal in (True, False) for own in (pairs, *drawn)]
    (own, *null), (plain, *plain_null) = seen[: 1 + samples], seen[1 + samples :]
    means = torch.stack([_differences(product.rows, p).double().mean(0) for p in pairs])
    left = {n: "fewer than three pairs of single tokens" for n in concepts.names if n not in ids}
    return ConceptDirections(
        alignment=torch.stack([each.mean() for each in own.each]),
        interval=torch.stack([mean_interval(each, within=(-1.0, 1.0)) for each in own.each]),
        null=_alignments(null),
        cosine=own.cosine,
        cosine_null=torch.stack([one.cosine for one in null], -1),
        plain_alignment=torch.stack([each.mean() for each in plain.each]),
        plain_alignment_null=_alignments(plain_null),
        plain_cosine=plain.cosine,
        plain_cosine_null=torch.stack([one.cosine for one in plain_null], -1),
        direction=(means / product.whiten(means).norm(dim=-1, keepdim=True)).float(),
        labels={"concept": list(ids), "other": list(ids), "bound": BOUNDS},
        units=_UNITS | {"direction": "unembedding"},
        record={"pairs": {n: len(p) for n, p in ids.items()}, "left out": left, "rank": product.rank},
    )


@dataclass(frozen=True)
class _Compared:
    """Leave-one-out cosines of the pairs of each concept, and cosines between concepts."""

    each: list[Float[Tensor, "pair"]]
    cosine: Float[Tensor, "concept other"]


def _differences(rows: Float[Tensor, "token d"], pairs: Int[Tensor, "pair 2"]) -> Float[Tensor, "pair d"]:
    return rows[pairs[:, 1]] - rows[pairs[:, 0]]


def _compared(product: CausalProduct, pairs: list[Tensor], causal: bool) -> _Compared:
    each, means = list[Tensor](), list[Tensor]()
    for own in pairs:
        x = _differences(product.rows, own)
        x = product.whiten(x) if causal else x.double()
        total = x.sum(0)
        each.append((normalize(x, dim=-1) * normalize(total - x, dim=-1)).sum(-1).float())
        means.append(total)
    unit = normalize(torch.stack(means), dim=-1)
    return _Compared(each, (unit @ unit.T).float())


def _alignments(samples: list[_Compared]) -> Float[Tensor, "concept sample"]:
    return torch.stack([torch.stack([each.mean() for each in one.each]) for one in samples], -1)
