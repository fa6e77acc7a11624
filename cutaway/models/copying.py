"""The copying score of OV circuits: does a head raise the token that it looks at?"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.stats import generator
from cutaway.models import circuits
from cutaway.models.anatomy.weights import logit_readers
from cutaway.models.model import Model


def copying(
    model: Model, layers: list[int], samples: int, seed: int
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head sample"]]:
    """Return Σλ / Σ|λ| over the eigenvalues of W_E W_V W_O W_U for every head (Elhage et al. 2021), and its null.

    1 is a circuit that raises every token it reads, −1 one that lowers every token. The eigenvalues other than 0 are
    those of W_O W_U W_E W_V [d_head, d_head], with the norms folded in: their weights, and the direction that a norm
    which subtracts the mean hides. In the null, every head reads with the values of a random other key-value head; NaN
    if there is only one.

    Raises:
        Refused: values or z are not what the weights make of what attention reads, or nothing is unembedded.
    """
    circuit = circuits.ov(model, [Address("z", i, h) for i in layers for h in range(model.shape.n_heads)])
    unembed = logit_readers(model.anatomy, dtype=torch.float32).detach()
    through = unembed.T @ model.weights.embed.detach().float()
    into = circuit.right.float() @ through  # [layer * head, d_head, d_model]
    values = circuit.left.float()  # [layer * head, d_model, d_head]
    g, null, group = generator(seed), list[Tensor](), model.shape.n_heads // model.shape.n_kv_heads
    several = len(values) // group  # key-value heads, whose values a group of heads shares
    for _ in range(samples):
        steps = torch.randint(1, max(several, 2), (len(values),), generator=g)
        others = (torch.arange(len(values)) + group * steps) % len(values)
        score = _score(into @ values[others.to(values.device)])
        null.append(score if several > 1 else torch.full_like(score, math.nan))
    shape = (len(layers), -1)
    return _score(into @ values).reshape(shape), torch.stack(null, -1).reshape(*shape, samples)


def _score(circuit: Float[Tensor, "head d_head d_head"]) -> Float[Tensor, "head"]:
    values = torch.linalg.eigvals(circuit.cpu().double())
    return (values.real.sum(-1) / values.abs().sum(-1).clamp_min(1e-30)).float()
