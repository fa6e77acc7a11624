"""Measured effects of edges: each reader reads one writer's alternative value, and the model runs on from there.

Every edge is an edit of one reader's input, so that a sweep runs all of them: from the reader's layer and the first
position that changes on, many edges in a batch. What a reader reads is made only when its run is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cutaway.circuits.alternatives import Alternatives
from cutaway.circuits.edge_estimates import change
from cutaway.core.address import Address, Pattern, listed
from cutaway.core.out_of_memory import in_halves
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.models.access.capture import Activations
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.access.reader_gradients import reading_norm
from cutaway.models.anatomy.offload import present
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edge_mask import places_written
from cutaway.models.edits.edit import Edit, at_places, fitting
from cutaway.models.edits.wiring import Wiring
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep

_PART_BYTES = 1 << 30  # of the expanded changes of all writers, for one part of the prompts


@dataclass(frozen=True, eq=False)
class Rewired(Edit):
    """Give one reader the stream with a step added to it, through the reader's norm.

    Attributes:
        address: the reader's input.
        stream: the stream that it reads.
        step: what is added.
        norm: the norm between.
        seed: draws a random direction for the step, of the same length at each position; None keeps it.
        since: the first position at which the step is not zero.
    """

    address: Address | str
    stream: Float[Tensor, "batch position d_model"] = field(repr=False)
    step: Float[Tensor, "batch position d_model"] = field(repr=False)
    norm: nn.Module | None = field(repr=False)
    seed: int | None = None
    since: int = 0
    positions: tuple[int, ...] | None = None

    def select_prompts(self, prompts: BatchSlice) -> Edit:
        stream, step = (prompts.tensor(x, self.axes()) for x in (self.stream, self._drawn()))
        return replace(self, stream=stream, step=step, seed=None)

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        def read(old: Tensor) -> Tensor:
            new = fitting(self, self.stream, old) + fitting(self, self._drawn(), old).to(old.dtype)
            if self.norm is None:
                return new
            with present(self.norm):
                return self.norm.forward(new)

        return at_places(self, x, frame, read)

    def _drawn(self) -> Float[Tensor, "batch position d_model"]:
        if self.seed is None:
            return self.step
        noise = torch.randn(self.step.shape, generator=generator(self.seed)).to(self.step)
        return noise * (self.step.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


def measured(
    model: Model, wiring: Wiring, given: Alternatives, edges: Sequence[int], steps: Sequence[tuple[int, int]] = ()
) -> tuple[Float[Tensor, "edge prompt"], Float[Tensor, "step prompt"], Float[Tensor, "prompt"]]:
    """Return the score of some edges for every prompt, mean over donors, the scores of random steps at some of them,
    and the metric without any.

    Args:
        edges: indices of edges of the wiring.
        steps: the position among `edges`, and a seed of its own, of every random step.
    """
    done, before, n = list[Tensor](), list[Tensor](), len(given.bound)

    def work(rows: Sequence[int]) -> None:
        some, donors = given.bound.rows(rows), given.part(model, rows)
        target = some.corrupt if given.direction == "denoise" else some.clean
        own = model.capture(target, [*given.places, *_streams(model)], logits=False)
        with torch.no_grad():
            made = [_variants(model, wiring, own, stand, edges, given.since) for stand in donors]
        chance = [[replace(made[s % len(made)][i], seed=s)] for i, s in steps]
        found = sweep(model, target, [[], *([e] for each in made for e in each), *chance], some.measure).cpu()
        count = len(edges) * len(donors)
        mean = found[1 : 1 + count].unflatten(0, (len(donors), len(edges))).mean(0)
        done.append(given.sign * (torch.cat([mean, found[1 + count :]]) - found[0]).float())
        before.append(found[0].float())

    one = 4 * given.target.ids.shape[1] * model.shape.d_model * len(wiring.writers)
    in_halves(range(n), max(1, _PART_BYTES // one), work)
    values = torch.cat(done, dim=1)
    return values[: len(edges)], values[len(edges) :], torch.cat(before)


def chosen_edges(model: Model, wiring: Wiring, writers: Sequence[Pattern], readers: Sequence[Pattern]) -> list[int]:
    """Return the edges whose ends these patterns mean; no pattern means all.

    Raises:
        Refused: no such place, or no edge between.
    """
    ends = [(wiring.writers, writers), (wiring.readers, readers)]
    meant = [[_means(model, patterns, place) for place in places] for places, patterns in ends]
    found = [i for i, (u, v) in enumerate(wiring.pairs.tolist()) if meant[0][u] and meant[1][v]]
    if not found:
        what = f"edges from {listed(writers) or 'all'} to {listed(readers) or 'all'}"
        raise Refused(what, "there is none", "name writers such as z.3 and readers such as q_in.5, mlp_in or logits")
    return found


def _means(model: Model, patterns: Sequence[Pattern], place: Address) -> bool:
    return not patterns or not {place, place.place}.isdisjoint(model.places(list(patterns)))


def _streams(model: Model) -> list[Address]:
    layers = range(model.shape.n_layers)
    found = dict.fromkeys(reading_norm(model.anatomy, i, name)[1] for i in layers for name in ("ln1", "ln2"))
    return [*found, Address("resid_post", model.shape.n_layers - 1)]


def _variants(
    model: Model, wiring: Wiring, own: Activations, stand: Activations, edges: Sequence[int], since: int
) -> list[Rewired]:
    changes = [x for place in places_written(wiring) for x in change(model, place, own, stand).unbind(2)]
    out = list[Rewired]()
    for u, v in wiring.pairs[list(edges)].tolist():
        reader = wiring.readers[v]
        if reader.layer is None:
            norm, stream = None, Address("resid_post", model.shape.n_layers - 1)
        else:
            norm, stream = reading_norm(model.anatomy, reader.layer, "ln2" if reader.site == "mlp_in" else "ln1")
        where = stream if reader.layer is None else reader
        out.append(Rewired(where, own[str(stream)], changes[u], norm, since=since))
    return out
