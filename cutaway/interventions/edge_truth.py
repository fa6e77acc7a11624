"""Exact effects of single edges, and which edges can be found at all by taking them out.

An edge u→v is patched exactly: the reader v reads the stream with another value of the writer u in it, all that is
between them and all other readers being left as they are, and everything behind v is computed again.

A circuit that is known by its weights has edges that no such experiment can find: a position's index is the same in
any two texts, so its exchange changes nothing. So there are three truths, each in the one before: the edges that the
weights make (structural, `zoo.compiled`), those that matter to some text under some ablation (functional), and those
that matter under this ablation on these texts (identifiable). A method that ablates is judged by the last.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.interventions.ablation_values import Removal, removal
from cutaway.models.edits.edges import EdgePatch
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Freeze, Replace
from cutaway.models.edits.wiring import Wiring
from cutaway.models.model import Model
from cutaway.models.sweep.edges import sweep_edges
from cutaway.models.sweep.executor import Metric
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

Ablation = Literal["corrupt", "zero", "mean", "resample"]
ABLATIONS: tuple[Ablation, ...] = ("corrupt", "zero", "mean", "resample")
#: a smaller change of the metric, in its unit, is rounding
TOLERANCE = 1e-2


def edge_effects(
    model: Model,
    bound: Bound,
    wiring: Wiring,
    ablation: Ablation,
    measure: Metric | None = None,
    seed: int = 0,
    sinks: bool = True,
) -> Float[Tensor, "edge prompt *metric"]:
    """Return what each edge's removal does to the metric of each prompt: metric of the patched run − of the clean one.

    Args:
        model: the model.
        bound: the prompts.
        wiring: the edges, in the order of whose `pairs` the effects are.
        ablation: what stands in for the writer's value.
        measure: what is measured; the task's metric if not given.
        seed: of the donors of `resample`.
        sinks: True if `mean` also replaces each prompt's first token and special ones.

    Raises:
        Refused: an ablation that these prompts do not allow.
    """
    embeddings = [a for a in (Address("embed"), Address("pos_embed")) if model.places([a.site])]
    places = list(dict.fromkeys(u.place for u in wiring.writers if u.layer is not None))
    found = removal(model, bound, [*embeddings, *places], ablation, seed, sinks)
    metric = measure or found.bound.measure
    frozen = tuple(Freeze(p, found.own) for p in places)
    before = model.measure(found.bound.clean, metric)
    each = []
    for donor in range(len(found.stands)):
        senders = {u: _sender(found, u, embeddings, donor) for u in wiring.writers}
        patches = [
            EdgePatch(senders[wiring.writers[u]], (wiring.readers[v],), frozen) for u, v in wiring.pairs.tolist()
        ]
        each.append(sweep_edges(model, found.bound.clean, patches, metric) - before)
    return torch.stack(each).mean(0).float().cpu()


def _sender(found: Removal, writer: Address, embeddings: list[Address], donor: int) -> Edit:
    if writer.layer is not None:
        return found.edit(writer, donor)
    own, stand = found.own, found.stands[donor % len(found.stands)]
    moved = sum((stand[str(a)] - own[str(a)] for a in embeddings), torch.zeros(()))
    return Replace("embed", own["embed"] + moved, since=found.since)


def identifiable(model: Model, task: Task, wiring: Wiring, ablation: Ablation = "corrupt") -> Bool[Tensor, "edge"]:
    """Return the edges whose removal changes the task's metric on any of its prompts, by more than `TOLERANCE`.

    Raises:
        Refused: an ablation that these prompts do not allow.
    """
    return edge_effects(model, task.bind(model), wiring, ablation).abs().amax(1) > TOLERANCE


def functional(model: Model, task: Task, wiring: Wiring) -> Bool[Tensor, "edge"]:
    """Return the edges whose removal, by any of `ABLATIONS`, changes any logit behind any prompt of the task by more
    than `TOLERANCE`. More prompts can only find more.
    """
    bound = task.bind(model)
    each = [edge_effects(model, bound, wiring, how, lambda logits, prompt: logits) for how in ABLATIONS]
    return torch.stack([e.abs().amax((1, 2)) > TOLERANCE for e in each]).any(0)
