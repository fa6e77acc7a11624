"""Which heads read what earlier heads write, more than chance alone would align them?

Q-, K- and V-composition of every pair of heads (Elhage et al. 2021, A mathematical framework for transformer circuits):
how much of what the sender's OV circuit writes lies where the receiver's queries, keys or values read.

* `score[mode, sender, receiver]` = ‖W_OV M‖ / (‖W_OV‖ ‖M‖), Frobenius norms, with M = W_QK for Q, its transpose for K
  and the receiver's W_OV for V. It also grows where either circuit has few large singular values, whatever they align
  with, so scores of different pairs cannot be compared.
* `z[mode, sender, receiver]` can: score² minus its mean, in standard deviations, when the sender's output is turned by
  a random rotation of the residual stream. Both moments are exact. With n dimensions, P and Q the Gram matrices of the
  two sides with trace 1, the mean is 1 / n and the variance 2 (tr P² − 1/n) (tr Q² − 1/n) / ((n − 1)(n + 2)).
* Control: rotations drawn from the same distribution (`null`, in the units of `z`); pairs whose receiver does not come
  after the sender cannot compose, have NaN in `score` and `z`, and 95 % of their z lie in `backward`.
* Norms are folded in, also those behind attention and MLPs: their weights, and the direction that a norm which
  subtracts the mean hides. Where no norm stands in front of the layers, what they read is read plain.
* Assumption: the rotary form at distance zero. Heads that share a key-value head share their key and value weights.
* Known failures: trained streams have directions that most heads use, and a random rotation has none, so that z of
  trained models is large throughout; compare with `backward`. Weights are no use: a pair that composes may do nothing
  on any text (patch the path). MLPs between the two heads are left out.
* Equivalences: `score` is the plain formula on matrices multiplied out (tests), and TransformerLens'
  `all_composition_scores` on folded weights (`bench.parity`).
* Cost: no forward. One pass over rows of the Gram matrices of all heads, which are never kept whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator
from cutaway.models import circuits
from cutaway.models.anatomy.per_layer import Factored
from cutaway.models.model import Model
from cutaway.weights.alignment import inner, percentiles, scale

MODES: tuple[str, ...] = ("Q", "K", "V")


@dataclass(frozen=True, kw_only=True)
class Composition(Result, kind="composition"):
    """Composition of pairs of heads, beside what random rotations of the residual stream give.

    Attributes:
        z: how far score² lies above its mean over rotations, in standard deviations.
        null: the same of drawn rotations.
        score: the Frobenius ratio; 0 to 1.
        backward: the 2.5 and 97.5 percentiles of z among pairs that cannot compose.
    """

    z: Float[Tensor, "mode sender receiver"]
    null: Float[Tensor, "mode sender receiver sample"]
    score: Float[Tensor, "mode sender receiver"]
    backward: Float[Tensor, "mode bound"]


@method(
    answers="Which heads read what earlier heads write, more than chance alone would align them?",
    paper="Elhage et al. 2021, A mathematical framework for transformer circuits",
    cost="0",
    control="rotated_basis",
    rung="observational",
)
def composition(
    model: Model,
    /,
    *,
    senders: tuple[str, ...] = (),
    receivers: tuple[str, ...] = (),
    samples: int = 8,
    seed: int = 0,
) -> Composition:
    """Score every pair of a head that writes and a head that reads.

    Args:
        senders: heads that write, as `layer.head` or `layer.*` [default: all].
        receivers: heads that read [default: all].
        samples: how many random rotations make the null.
        seed: of the rotations.

    Raises:
        Refused: an encoder, no such head, or heads whose values are not linear in what they read.
    """
    if not model.family.causal:
        raise Refused(f"composition in {model.name}", "it is an encoder", "ask a causal model")
    first, then = circuits.heads(model, senders), circuits.heads(model, receivers)
    n, (there, reading), reasons = circuits.dims(model), *_reading(model, then)
    impossible = torch.tensor([[(a.layer or 0) >= (b.layer or 0) for b in then] for a in first])
    layers = [a.layer or 0 for a in then] * len(there)
    found = _pairs(circuits.ov(model, first).T, reading, n, layers, samples, seed).cpu().float()
    every = torch.full((3, *impossible.shape, 2 + samples), math.nan)
    every[there] = found.unflatten(1, (len(there), -1)).transpose(0, 1)
    square, z, null = every.split([1, 1, samples], -1)
    outside = torch.stack([percentiles(x[impossible]) for x in z[..., 0]])
    if not impossible.any():
        reasons["backward"] = "every receiver comes after every sender"
    if impossible.all():
        reasons["score"] = "no receiver comes after a sender"
    norms = "folded" if circuits.readable(model).is_folded else "not folded: the family norms what layers write"
    return Composition(
        z=z[..., 0].masked_fill(impossible, math.nan),
        null=null,
        score=square[..., 0].clamp_min(0).sqrt().masked_fill(impossible, math.nan),
        backward=outside,
        labels={"mode": [*MODES], "sender": _names(first), "receiver": _names(then), "bound": BOUNDS},
        units={"z": "standard deviations of a rotation", "score": "Frobenius ratio"},
        reasons={"z": "it is of the weights alone, which have no spread over prompts"} | reasons,
        record={"norms": norms, "dimensions": n},
    )


def _names(places: list[Address]) -> list[str]:
    return [f"{a.layer}.{a.unit}" for a in places]


def _reading(model: Model, heads: list[Address]) -> tuple[tuple[list[int], Factored], dict[str, str]]:
    """Return the circuits that read, of all heads for one mode after the other, with the modes there are; and why
    others are missing.
    """
    values, reasons = circuits.ov(model, heads), dict[str, str]()
    try:
        form = circuits.qk(model, heads)
        parts = [form, form.T, values]
    except Refused as refusal:
        parts, reasons = [values], dict.fromkeys(MODES[:2], refusal.why)
    left, right = (torch.cat([getattr(f, side) for f in parts]) for side in ("left", "right"))
    return (list(range(3 - len(parts), 3)), Factored(left, right)), reasons


def _pairs(
    sender: Factored, receiver: Factored, n: int, layers: list[int], samples: int, seed: int
) -> Float[Tensor, "sender receiver value"]:
    """Return score², z and drawn z of every pair; a circuit that is 0 throughout gives NaN."""
    sides = [(f.left, f.right @ f.right.mT) for f in (sender, receiver)]
    grams = [_gram(*side) for side in sides]
    traces = [g.diagonal(dim1=-2, dim2=-1).sum(-1) for g in grams]
    square = inner(sides[0], sides[1]) / (traces[0][:, None] * traces[1])
    a, b = ((g / t[:, None, None]) for g, t in zip(grams, traces, strict=True))
    deviation = scale(a.square().sum((-2, -1)), b.square().sum((-2, -1)), n)
    drawn = torch.cat([square[..., None], _rotated(a, b, n, layers, samples, seed)], -1)
    return torch.cat([square[..., None], (drawn - 1 / n) / deviation[..., None]], -1)


def _gram(x: Float[Tensor, "head d_model d_head"], core: Float[Tensor, "head d_head d_head"]) -> Tensor:
    """Return a [d_head, d_head] matrix with the eigenvalues of x core xᵀ other than 0, in float64."""
    x, core = x.double(), core.double()
    size = core.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    root, failed = torch.linalg.cholesky_ex(core + 1e-12 * size * torch.eye(core.shape[-1]).to(core))
    if failed.any():  # a circuit of lower rank, whose small eigenvalues rounding made negative
        values, vectors = torch.linalg.eigh(core[failed > 0])
        root[failed > 0] = vectors * values.clamp_min(0).sqrt()[:, None]
    return root.mT @ (x.mT @ x) @ root


def _rotated(
    a: Float[Tensor, "sender rank rank"],
    b: Float[Tensor, "receiver rank rank"],
    n: int,
    layers: list[int],
    samples: int,
    seed: int,
) -> Float[Tensor, "sender receiver sample"]:
    """Return score² of every pair after random rotations of the sender, one for each layer of receivers.

    Of a rotation only the corner [rank, rank] between the two circuits' own subspaces matters: the corner of n rows of
    Gaussian numbers made orthonormal.
    """
    if a.shape[-1] > n:  # more columns than dimensions: the eigenvalues that are left
        a, b = (torch.diag_embed(torch.linalg.eigvalsh(x)[:, -n:]) for x in (a, b))
    g, rank, out = generator(seed), a.shape[-1], a.new_empty(len(a), len(b), samples)
    of = torch.tensor(layers)
    for sample in range(samples):
        for layer in dict.fromkeys(layers):
            x = torch.randn(n, rank, generator=g, dtype=torch.float64)
            root = torch.linalg.cholesky(x.T @ x)
            corner = torch.linalg.solve_triangular(root, x[:rank].T, upper=False).T.to(a)
            turned = corner @ b[of == layer] @ corner.T
            out[:, of == layer, sample] = a.flatten(1) @ turned.flatten(1).T
    return out
