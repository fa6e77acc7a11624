"""Directions from a pair of prompts (ActAdd, arXiv:2308.10248), and from pairs of words (the causal inner product)."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from cutaway.core.address import Address
from cutaway.core.refuse import Keyword, Refused
from cutaway.directions.direction import Direction, direction
from cutaway.interventions.causal_product import CausalProduct
from cutaway.models.model import Model
from cutaway.models.tokens import batch
from cutaway.tasks.concepts import Concepts


def activation_addition(model: Model, positive: str, negative: str, address: str | Address) -> Direction:
    """Return the difference of two prompts at each position, aligned at the front (Turner et al. 2023).

    The shorter prompt is filled up with spaces. Positions at which nothing differs, such as that of a
    beginning-of-text token, are left out. `add` acts at the same positions of a prompt, which must be as long.

    Raises:
        Refused: prompts that differ nowhere, or prompts of different lengths where no token is a space.
    """
    both = model.tokens([positive, negative])
    rows = [row[real].tolist() for row, real in zip(both.ids, both.mask, strict=True)]
    length = max(map(len, rows))
    if min(map(len, rows)) < length:
        space = model.tokenizer(" ", add_special_tokens=False)["input_ids"]
        if len(space) != 1:
            why = f"they have {len(rows[0])} and {len(rows[1])} tokens, and no token of this model is a space"
            raise Refused(f"the difference of {positive!r} and {negative!r}", why, "give prompts of equal length")
        rows = [row + space * (length - len(row)) for row in rows]
    (place,) = model.places([address])
    x = model.capture(batch(rows), place, logits=False)[str(place)].float()
    apart = {str(place.at(p)): v for p, v in enumerate(x[0] - x[1]) if v.any()}
    if not apart:
        why = "they do not differ at any position there"
        raise Refused(f"the difference of {positive!r} and {negative!r} at {place}", why, "give other prompts")
    return direction(apart, f"{positive} − {negative}", positive, negative, model.family.name)


def causal_difference(model: Model, concepts: Concepts, name: str) -> Direction:
    """Return the direction of the last stream that raises a concept alone, Cov(γ)⁻¹ of the mean difference of the
    unembedding rows of its pairs of words (Park et al. 2023, arXiv:2311.03658), of length 1.

    Concepts whose words are orthogonal to it in the causal inner product keep their logits.

    Raises:
        Refused: no such concept with three pairs of single tokens, or no linear unembedding.
    """
    ids = concepts.ids(model)
    if name not in ids:
        why = f"the concepts with three pairs of single tokens are {', '.join(ids)}"
        raise Refused(Keyword("name", name), why, "name one of these")
    product, pairs = CausalProduct.of(model), torch.tensor(ids[name])
    mean = (product.rows[pairs[:, 1]] - product.rows[pairs[:, 0]]).mean(0)
    vector = normalize(product.steering(mean), dim=0)
    return direction({f"resid_post.{model.shape.n_layers - 1}": vector}, name, name, f"not {name}", model.family.name)
