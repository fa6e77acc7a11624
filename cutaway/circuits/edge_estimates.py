"""First-order estimates of all edges: gradients at readers times the changes of writers, prompt by prompt.

The estimate of u → v is Σ (alt_u − cur_u) · ∂metric/∂x_v over positions and dimensions. Neither side is ever held
whole: changes are expanded for some source layers at a time and gradients for one layer of readers, so that memory
grows with what a layer's heads write. Prompts go in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.alternatives import Alternatives
from cutaway.core.address import Address
from cutaway.core.out_of_memory import in_halves
from cutaway.models.access.capture import Activations
from cutaway.models.access.reader_gradients import ReaderGradients
from cutaway.models.edits.edge_mask import head_writes
from cutaway.models.edits.wiring import Wiring
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound

_CHUNK_BYTES = 1 << 28  # of the changes of writers that are expanded at a time
_PART_BYTES = 1 << 30  # of the activations and gradients of one part of the prompts


@dataclass(frozen=True)
class Backward:
    """Gradients at readers, for some prompts.

    Attributes:
        values: the metric of each prompt, in the run whose edges are cut.
        own: the writers' values in that run.
        slopes: places of writers, with the gradients that their changes are multiplied by; of several, by their mean.
    """

    values: Float[Tensor, "prompt"]
    own: Mapping[str, Tensor]
    slopes: Iterable[tuple[Sequence[Address], Sequence[ReaderGradients]]]

    @staticmethod
    def of(places: Sequence[Address], slopes: Sequence[ReaderGradients]) -> Backward:
        """Return gradients for all places, of which the first were taken in the run whose edges are cut."""
        return Backward(slopes[0].values, slopes[0].given, [(places, slopes)])


@dataclass(frozen=True)
class Estimates:
    """Estimates of all edges.

    Attributes:
        each: the products of every prompt and edge.
        variance: of the mean product, if each writer's change had a random direction.
        values: the metric of each prompt, in the run whose edges are cut.
    """

    each: Float[Tensor, "prompt edge"]
    variance: Float[Tensor, "edge"]
    values: Float[Tensor, "prompt"]


Gradients = Callable[[Bound, Activations], Backward]


def estimated(model: Model, wiring: Wiring, given: Alternatives, gradients: Gradients, copies: int = 1) -> Estimates:
    """Return the products of every prompt and edge, mean over donors.

    Args:
        gradients: takes some prompts and the first donor's values.
        copies: how many runs of a prompt `gradients` holds at a time.
    """
    done, n = list[Estimates](), len(given.bound)

    def work(rows: Sequence[int]) -> None:
        donors, some = given.part(model, rows), given.bound.rows(rows)
        found, mask = gradients(some, donors[0]), some.clean.mask
        each = torch.zeros(len(rows), *wiring.heard.shape, device=mask.device)
        variance = torch.zeros(wiring.heard.shape, device=mask.device)
        with torch.no_grad():
            for places, slopes in found.slopes:
                for stand in donors:
                    changes = _changes(model, places, found.own, stand, mask.numel())
                    _multiply(wiring, slopes, changes, mask, each, variance)
        u, v = wiring.pairs.T.to(mask.device)
        mean, spread = each[:, u, v] / len(donors), variance[u, v] / len(donors)
        done.append(Estimates(mean.cpu(), spread.cpu(), found.values.float().cpu()))

    in_halves(range(n), max(1, _rows(model, given) // copies), work)
    each, values = (torch.cat([getattr(part, name) for part in done]) for name in ("each", "values"))
    return Estimates(each, torch.stack([part.variance for part in done]).sum(0) / n**2, values)


def change(
    model: Model, place: Address, own: Mapping[str, Tensor], stand: Mapping[str, Tensor]
) -> Float[Tensor, "batch position unit d_model"]:
    """Return alternative less own values of a place's writers, as they add to the stream."""
    a, b = own[str(place)], stand[str(place)]
    if place.site != "z" or place.layer is None:
        return (b.float() - a.float()).unsqueeze(2)
    if model.anatomy.part(place.layer, "ln1_post") is None:
        return head_writes(model, place.layer, b - a).float()
    return (head_writes(model, place.layer, b) - head_writes(model, place.layer, a)).float()


def reader_groups(wiring: Wiring) -> list[tuple[Address, slice]]:
    """Return the readers that share a stream and a norm: the first of each group, and their indices."""
    out, at = list[tuple[Address, slice]](), 0
    for _, group in groupby(wiring.readers, lambda v: (v.layer, v.site == "mlp_in")):
        some = list(group)
        out.append((some[0], slice(at, at + len(some))))
        at += len(some)
    return out


def _multiply(
    wiring: Wiring,
    slopes: Sequence[ReaderGradients],
    changes: Iterable[tuple[Address, Float[Tensor, "batch writer position d_model"]]],
    mask: Bool[Tensor, "batch position"],
    each: Float[Tensor, "batch writer reader"],
    variance: Float[Tensor, "writer reader"],
) -> None:
    """Add the products of some writers' changes and the gradients of all readers that hear them."""
    whole = bool(mask.all())
    for first, delta in changes:
        start = wiring.writers.index(first)
        size, width = torch.linalg.vector_norm(delta, dim=-1).square(), delta.shape[-1]
        for reader, columns in reader_groups(wiring):
            heard = int(wiring.heard[start : start + delta.shape[1], columns].any(1).sum())  # the first of these
            if not heard:
                continue
            slope = slopes[0].at(reader) if len(slopes) == 1 else torch.stack([s.at(reader) for s in slopes]).mean(0)
            slope = (
                slope.float() if whole else slope.float() * mask[:, None, :, None]
            )  # [batch reader position d_model]
            rows = slice(start, start + heard)
            each[:, rows, columns] += delta[:, :heard].flatten(2) @ slope.flatten(2).transpose(1, 2)
            spread = size[:, :heard] @ torch.linalg.vector_norm(slope, dim=-1).square().transpose(1, 2)
            variance[rows, columns] += spread.sum(0) / width  # of a step times a random direction


def _changes(
    model: Model, places: Sequence[Address], own: Mapping[str, Tensor], stand: Mapping[str, Tensor], tokens: int
) -> Iterator[tuple[Address, Float[Tensor, "batch writer position d_model"]]]:
    """Yield the changes of writers, as many source layers at a time as fit the bound, with the first writer."""
    most, held = max(1, _CHUNK_BYTES // (4 * tokens * model.shape.d_model)), list[tuple[Address, Tensor]]()
    for place in places:
        new = change(model, place, own, stand).transpose(1, 2)
        if held and sum(x.shape[1] for _, x in held) + new.shape[1] > most:
            yield held[0][0], torch.cat([x for _, x in held], 1)
            held = []
        held.append((_first_writer(place), new))
    yield held[0][0], torch.cat([x for _, x in held], 1)


def _first_writer(place: Address) -> Address:
    return Address("embed") if place.site == "resid_pre" else replace(place, unit=0) if place.site == "z" else place


def _rows(model: Model, given: Alternatives) -> int:
    """Return the number of prompts per part."""
    s, width = model.shape, given.target.ids.shape[1]
    one = 4 * width * s.n_layers * (8 * s.d_model + model.anatomy.widest(width))
    scores = 4 * (1 + s.n_layers * (s.n_heads + 1)) * s.n_layers * (s.n_heads + 2 * s.n_kv_heads + 1)
    return max(1, _PART_BYTES // (one + scores))
