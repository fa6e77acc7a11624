"""Small truths on which one failure of dictionaries at a time can be seen.

* `absorption`: a feature that fires only where its parent does; a sparse dictionary lets the child's latent absorb the
  parent, whose latent then falls silent there (Chanin et al. 2024, arXiv:2409.14507).
* `hedging`: correlated features and a dictionary too narrow for them; its latents mix what fires together
  (Chanin et al. 2025, arXiv:2505.11756).
* `superposition`: more features than dimensions, in the geometry that a toy model finds for them
  (Elhage et al. 2022, arXiv:2209.10652).
* `zipf_toy`: many independent features of very different frequency, quick to learn: what training loops are tuned on.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.dictionaries.benchmarks.directions import orthogonal_directions, random_directions
from cutaway.dictionaries.benchmarks.generative import Law
from cutaway.dictionaries.benchmarks.synthetic import zipf
from cutaway.dictionaries.benchmarks.truth import Truth


def absorption(*, d: int = 50, parent: float = 0.25, child: float = 0.2, others: int = 2, seed: int = 0) -> Truth:
    """Return a parent (feature 0), its child (feature 1, firing on `child` of all tokens), and unrelated others,
    orthogonal.

    All magnitudes are 1. A dictionary with the directions (parent + child, parent) reconstructs as well as the truth
    with a smaller L0: that is why absorption happens.

    Raises:
        Refused: the child fires more often than the parent.
    """
    if child > parent:
        raise Refused(f"a child of frequency {child}", f"its parent has {parent}", "make the child rarer")
    probability = torch.tensor([parent, child / parent, *[0.05] * others])
    above = torch.tensor([-1, 0, *[-1] * others])
    ones = torch.ones(len(probability))
    law = Law(probability, above, ones, 0 * ones)
    about = {"toy": "absorption", "parent": parent, "child": child, "seed": seed}
    return Truth(orthogonal_directions(len(ones), d, generator(seed)), torch.zeros(d), law, about)


def hedging(*, d: int = 50, frequency: float = 0.3, correlation: float = 0.5, seed: int = 0) -> Truth:
    """Return two orthogonal features of one frequency and a Gaussian correlation; what a dictionary of one latent must
    mix.

    Raises:
        Refused: a correlation outside [0, 1).
    """
    if not 0 <= correlation < 1:
        raise Refused(f"a correlation of {correlation}", "it must lie in [0, 1)", "choose such a number")
    two = torch.ones(2)
    factor = torch.full((2, 1), correlation**0.5)
    law = Law(two * frequency, torch.tensor([-1, -1]), two, 0.1 * two, factor)
    about = {"toy": "hedging", "correlation": correlation, "seed": seed}
    return Truth(orthogonal_directions(2, d, generator(seed)), torch.zeros(d), law, about)


def superposition(
    *, features: int = 5, d: int = 2, frequency: float = 0.05, importance: float = 1.0, seed: int = 0, steps: int = 2000
) -> Truth:
    """Return the directions that a toy model of superposition learns: x̂ = ReLU(WᵀW x + b) on sparse uniform
    magnitudes.

    Feature i has importance `importance`^i in the loss. Activations are W x. Directions of features that the model does
    not represent are short; they stay as they are.
    """
    g = generator(seed)
    weight = torch.tensor(importance) ** torch.arange(features)
    w = (torch.randn(d, features, generator=g) * 0.5).requires_grad_()
    b = torch.zeros(features, requires_grad=True)
    law = Law(
        torch.full((features,), frequency),
        torch.full((features,), -1),
        torch.full((features,), 0.5),
        torch.zeros(features),
        uniform=True,
    )
    optimiser = torch.optim.Adam([w, b], lr=1e-2)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        x = _sparse_uniform(1024, frequency, features, g)
        loss = (weight * ((x @ w.T) @ w + b).relu().sub(x) ** 2).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    about = {"toy": "superposition", "frequency": frequency, "importance": importance, "seed": seed, "steps": steps}
    return Truth(w.detach().T.contiguous(), torch.zeros(d), law, about)


def zipf_toy(
    *, features: int = 1024, d: int = 256, exponent: float = 0.5, most: float = 0.3, least: float = 7e-3, seed: int = 0
) -> Truth:
    """Independent features in random directions, frequencies falling as rank^−exponent, magnitudes 1 ± 0.25."""
    g = generator(seed)
    ones = torch.ones(features)
    law = Law(zipf(features, exponent, most, least), torch.full((features,), -1), ones, 0.25 * ones)
    about = {"toy": "zipf", "exponent": exponent, "most": most, "least": least, "seed": seed}
    return Truth(random_directions(features, d, g), torch.zeros(d), law, about)


def _sparse_uniform(tokens: int, frequency: float, features: int, g: torch.Generator) -> Float[Tensor, "token feature"]:
    active = torch.rand(tokens, features, generator=g) < frequency
    return torch.rand(tokens, features, generator=g) * active
