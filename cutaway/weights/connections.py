"""Which components read what others write, more than chance would align them?

Virtual weights of any two components (Elhage et al. 2021, A mathematical framework for transformer circuits): what a
head, an MLP or a single neuron writes into the stream, times what a later one reads of it. `composition` follows heads
from what they attend to; here stands what leaves one component and enters another, whatever their kinds.

* `score[writer, reader]` = ‖A B‖ / (‖A‖ ‖B‖), Frobenius norms, with A the writer's W_O or rows of W_out, and B the
  reader's W_Q, W_K, W_V or columns of W_in. Of two neurons it is the cosine's size. `virtual_weights` returns A B.
* `z[writer, reader]`: score² less its mean, in standard deviations, when the writer's output is turned by a random
  rotation of the stream. Both moments are exact (`composition` has the formula), so that components of any rank can be
  compared.
* Control: rotations drawn from the same distribution (`null`, in the units of `z`); pairs whose reader does not come
  after the writer have NaN in `score` and `z`, and 95 % of their z lie in `backward`.
* Norms are folded in, also those behind attention and MLPs: their weights, and the direction that a norm which
  subtracts the mean hides. Where no norm stands in front of the layers, what they read is read plain.
* Names: writers are `embed`, `z.9.6`, `mlp_post.3` (an MLP), `mlp_post.3.17` (a neuron); readers `q.10.0`, `k.10.0`,
  `v.10.0` of a (key-value) head, `mlp_pre.4`, `mlp_pre.4.17` (`mlp_gate` in a gated MLP) and `logits`. `*` is all.
* Assumption: the direct way through the stream. Layers between the two are left out, and so is every activation.
* Known failures: trained streams have directions that most components use, and a random rotation has none, so that z is
  large throughout; compare with `backward`. Of two neurons score² is far from normal: z above 5 is no rarity there.
  An aligned pair may do nothing on any text (patch the path).
* Equivalences (tests): the plain formula on `virtual_weights` multiplied out, and rotated streams.
* Cost: no forward. One pass over rows of Gram matrices, which are never kept whole, and `samples` rotations for each
  layer that reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, rotation
from cutaway.models import circuits
from cutaway.models.anatomy.weights import Weights, logit_readers
from cutaway.models.model import Model
from cutaway.weights.alignment import inner, percentiles, scale
from cutaway.weights.virtual import READERS, WRITERS, comes_after

#: the norm behind what a writer of the site writes, in families that have one
_NORMS: dict[str, Literal["ln1_post", "ln2_post"]] = {"z": "ln1_post", "mlp_post": "ln2_post"}
_WRITERS = ("z.*.*", "mlp_post.*")
_READERS = ("q.*.*", "k.*.*", "v.*.*")
_CELLS = 1 << 24  # of products at once


@dataclass(frozen=True, kw_only=True)
class Connections(Result, kind="connections"):
    """Virtual weights of pairs of components, beside what random rotations of the residual stream give.

    Attributes:
        z: how far score² lies above its mean over rotations, in standard deviations.
        null: the same of drawn rotations.
        score: the Frobenius ratio; 0 to 1.
        backward: the 2.5 and 97.5 percentiles of z among pairs whose reader does not come after the writer.
    """

    z: Float[Tensor, "writer reader"]
    null: Float[Tensor, "writer reader sample"]
    score: Float[Tensor, "writer reader"]
    backward: Float[Tensor, "bound"]


@dataclass
class _Group:
    """Components of one kind, which have weights of one shape.

    Attributes:
        at: their places among all.
        x: what they write or read [component, d_model, rank], of norm 1.
        values: eigenvalues of x xᵀ, in float64, the largest last.
    """

    at: list[int]
    x: Float[Tensor, "component d_model rank"]
    values: Float[Tensor, "component eigenvalue"]


@method(
    answers="Which components read what others write, more than chance would align them?",
    paper="Elhage et al. 2021, A mathematical framework for transformer circuits",
    cost="0",
    control="rotated_basis",
    rung="observational",
)
@torch.no_grad()
def connections(
    model: Model,
    /,
    *,
    writers: tuple[str, ...] = (),
    readers: tuple[str, ...] = (),
    samples: int = 8,
    seed: int = 0,
) -> Connections:
    """Score every pair of a component that writes and a component that reads.

    Args:
        writers: heads, MLPs, neurons or the embedding [default: all heads and MLPs].
        readers: sides of heads, MLPs, neurons or the logits [default: queries, keys and values of all heads].
        samples: how many random rotations make the null.
        seed: of the rotations.

    Raises:
        Refused: an encoder, no such component, or one that does not write to the stream or read from it.
    """
    if not model.family.causal:
        raise Refused(f"virtual weights of {model.name}", "it is an encoder", "ask a causal model")
    first, then = (
        _places(model, writers, WRITERS, "embed", _WRITERS),
        _places(model, readers, READERS, "logits", _READERS),
    )
    n, weights = circuits.dims(model), circuits.readable(model)
    left, right = _groups(model, weights, first, WRITERS, n), _groups(model, weights, then, READERS, n)
    square, deviation = (torch.full((len(first), len(then)), math.nan, dtype=torch.float64) for _ in range(2))
    for a in left:
        for b in right:
            at = torch.tensor(a.at)[:, None], torch.tensor(b.at)
            square[at] = _products(a.x, b.x).cpu()
            deviation[at] = scale(a.values.square().sum(1), b.values.square().sum(1), n).cpu()
    drawn = _rotated(left, right, [_depth(model, b) for b in then], (len(first), len(then)), n, samples, seed)
    z, null = (square - 1 / n) / deviation, (drawn - 1 / n) / deviation[..., None]
    impossible = torch.tensor([[not comes_after(model, a, b) for b in then] for a in first])
    reasons = {"z": "it is of the weights alone, which have no spread over prompts"}
    if not impossible.any():
        reasons["backward"] = "every reader comes after every writer"
    if impossible.all():
        reasons["score"] = "no reader comes after a writer"
    return Connections(
        z=z.masked_fill(impossible, math.nan).float(),
        null=null.float(),
        score=square.clamp_min(0).sqrt().masked_fill(impossible, math.nan).float(),
        backward=percentiles(z[impossible]).float(),
        labels={"writer": [str(a) for a in first], "reader": [str(b) for b in then], "bound": BOUNDS},
        units={"z": "standard deviations of a rotation", "score": "Frobenius ratio"},
        reasons=reasons,
        record={"norms": "folded" if weights.is_folded else "not folded", "dimensions": n},
    )


def _places(
    model: Model, asked: Sequence[str], sites: Mapping[str, object], end: str, default: Sequence[str]
) -> list[Address]:
    """Return the components of these names, by default all of some patterns that the model has."""
    if not asked:
        dense = [i for i in range(model.shape.n_layers) if model.anatomy.part(i, "down") is not None]
        found = [a for p in default if not p.startswith("mlp") or dense for a in model.places(p)]
        return [a for a in found if not a.site.startswith("mlp") or a.layer in dense]
    found = model.places(list(asked))
    for a in found:
        single = a.site.startswith("mlp") or a.unit is not None or a.site == end
        if a.site not in (*sites, end) or a.position is not None or not single:
            why = "it is no component of that side"
            raise Refused(f"component {a}", why, f"use {', '.join(sites)} with layer and head, or {end}")
    return found


def _depth(model: Model, place: Address) -> int:
    return model.shape.n_layers if place.layer is None else place.layer


def _groups(
    model: Model,
    weights: Weights,
    places: Sequence[Address],
    views: Mapping[str, Callable[[Weights, int], Tensor]],
    n: int,
) -> list[_Group]:
    """Return what components write or read, those of one shape together."""
    reads, found, whole = views is READERS, dict[tuple[str, bool], list[tuple[int, Tensor]]](), dict[tuple, Tensor]()
    for i, a in enumerate(places):
        if (key := (a.site, a.layer)) not in whole:
            whole = {key: _columns(model, weights, a, views, reads)}
        x = whole[key]
        if a.unit is not None:
            x = x[a.unit] if x.ndim == 3 else x[:, a.unit, None]
        found.setdefault((a.site, a.unit is None), []).append((i, _reduced(x)))
    out = list[_Group]()
    for members in found.values():
        x = torch.stack([x for _, x in members])
        norm = x.flatten(1).norm(dim=1)
        x = x / norm[:, None, None]  # a component of zeros gives NaN
        values = torch.linalg.eigvalsh((x.double().mT @ x.double()).nan_to_num()) * (norm / norm)[:, None]
        out.append(_Group([i for i, _ in members], x, values[:, -n:]))
    return out


def _columns(
    model: Model, weights: Weights, place: Address, views: Mapping[str, Callable[[Weights, int], Tensor]], reads: bool
) -> Float[Tensor, "*head d_model unit"]:
    """Return what all components of a site and layer write or read, a column for each of their units."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    if place.layer is None:
        x = logit_readers(model.anatomy, dtype=dtype).T if reads else weights.embed.T
    else:
        x = views[place.site](weights, place.layer)
        x = x if reads else circuits.behind(model, _NORMS[place.site], place.layer, x.detach().to(dtype)).mT
    x = x.detach().to(dtype)
    return x - x.mean(-2, keepdim=True) if circuits.centred(model) else x


def _reduced(x: Float[Tensor, "d_model unit"]) -> Float[Tensor, "d_model rank"]:
    """Return at most d_model columns with the same products."""
    if x.shape[1] <= x.shape[0]:
        return x
    values, vectors = torch.linalg.eigh((x @ x.T).double())
    return (vectors * values.clamp_min(0).sqrt()).to(x)


def _products(
    a: Float[Tensor, "writer d_model rank"], b: Float[Tensor, "reader d_model other"]
) -> Float[Tensor, "writer reader"]:
    """Return ‖A B‖² of every two components, by products or by Gram matrices, whichever are fewer numbers."""
    if 2 * a.shape[2] * b.shape[2] > a.shape[1]:
        return inner((a, None), (b, None))
    wide = b.movedim(1, 0).flatten(1)  # [d_model, reader × other]
    blocks = a.mT.split(max(1, _CELLS // (a.shape[2] * wide.shape[1])))
    found = [(some @ wide).double().unflatten(-1, (len(b), -1)).square().sum((1, 3)) for some in blocks]
    return torch.cat(found)


def _rotated(
    left: list[_Group], right: list[_Group], depths: list[int], shape: tuple[int, int], n: int, samples: int, seed: int
) -> Float[Tensor, "writer reader sample"]:
    """Return score² of every pair after random rotations of what is written, one for each layer that reads.

    Of a rotation only the squares of its corner between the eigenvectors of both sides matter.
    """
    g, out = generator(seed), torch.full((*shape, samples), math.nan, dtype=torch.float64)
    width = max(b.values.shape[1] for b in right)
    for sample in range(samples):
        for depth in dict.fromkeys(depths):
            square = rotation(n, g, columns=width, dtype=torch.float64).square()
            for b in right:
                here = [k for k, i in enumerate(b.at) if depths[i] == depth]
                theirs = square[:, : b.values.shape[1]].to(b.values) @ b.values[here].T  # [n, reader]
                for a in left:
                    at = torch.tensor(a.at)[:, None], torch.tensor([b.at[k] for k in here], dtype=torch.long)
                    out[(*at, sample)] = (a.values @ theirs[: a.values.shape[1]]).cpu()
    return out
