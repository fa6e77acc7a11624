"""Edits of many requests together: one value per request at the last layer, reached by changes of several layers.

The value z is that of the residual stream behind the last of the layers at the subject's end (`values.py`). From the
first layer on, each takes an equal share of what is still missing, R = (z − h) / (layers left), with keys and h of the
weights as edited so far; the change of a layer is that of the solver (`solve.py`). Second moments are those of the
model before any edit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.editing.covariance import of_texts
from cutaway.editing.knowledge_edit import Edit, KnowledgeEdit, halves, knowledge_edit
from cutaway.editing.places import CONTEXTS, Case, Layer, at_subject, cases, contexts
from cutaway.editing.request import Requests
from cutaway.editing.solve import Constraint, regularised, solve
from cutaway.editing.values import Found, Search, values
from cutaway.models.edits.rewrite_set import Rewrites
from cutaway.models.edits.rewrites import Rewrite, rewritten
from cutaway.models.model import Model
from cutaway.models.moments import Moments
from cutaway.tasks.prompts import Prompts

#: of a method that edits all requests together
COST = (
    "requests * (2 + min(4, prompts)) * ((steps + 1) * (F + B) + (2 + 2 * layers) * F)"
    " + (2 * samples + 4) * asked * F + (2 + samples) * min(16, prompts) * F + (prompts + 4 * layers + 8) * F"
)
KL = 0.0625  # weight of the divergence on "{subject} is a", as published
#: makes the constraint of a layer of its second moment with the ridge, and notes what records say of it
Constrain = Callable[[Float[Tensor, "d_mlp d_mlp"], dict[str, Any]], Constraint]


def together(
    model: Model,
    requests: Requests,
    prompts: Prompts,
    layers: Sequence[int],
    search: Search,
    ridge: float,
    constrain: Constrain,
    samples: int,
    seed: int,
) -> tuple[KnowledgeEdit, Rewrites]:
    """Edit all requests together, and measure the edit.

    Raises:
        Refused: layers that are not there or do not ascend, or what `Layer` refuses.
    """
    chosen = tuple(layers) or tuple(range(max(1, model.shape.n_layers // 3)))
    if list(chosen) != sorted(set(chosen)):
        raise Refused(f"an edit at layers {list(chosen)}", "they do not ascend", "name each once, in their order")
    fitted, held_out = halves(prompts)
    places = [Layer(model, n) for n in chosen]
    found = cases(model, list(requests), contexts(fitted, CONTEXTS, seed))
    moments = of_texts(model, chosen, fitted)
    value = values(model, found, Address("resid_post", chosen[-1]), search)
    rewrites, notes = spread(places, found, value, moments, ridge, constrain)
    record = {
        "layers": list(chosen),
        "log-probability of the new object": [round(p, 4) for p in value.log_prob.tolist()],
    }
    edits = [Edit(tuple(rewrites), tuple(range(len(requests))))]
    return knowledge_edit(model, requests, held_out, edits, samples, seed, record | {"solver": notes})


def spread(
    places: Sequence[Layer],
    cases: Sequence[Case],
    value: Found,
    moments: dict[int, Moments],
    ridge: float,
    constrain: Constrain,
) -> tuple[list[Rewrite], list[dict[str, Any]]]:
    """Return the rewrite of every layer, and per layer the condition of C and notes of its constraint."""
    rewrites, notes = list[Rewrite](), list[dict[str, Any]]()
    model, last = places[0].model, Address("resid_post", places[-1].layer)
    aim = value.start + value.delta
    with ExitStack() as made:
        for i, place in enumerate(places):
            keys = place.keys(cases).cpu()
            now = torch.stack([at_subject(model, c.prompt, last)[0] for c in cases]).cpu()
            second, before, after = regularised(moments[place.layer].second, ridge)
            note: dict[str, Any] = {"condition of C": before, "condition with the ridge": after}
            u, v = solve(keys, (aim - now).T / (len(places) - i), constrain(second, note))
            rewrites.append(Rewrite(place.weight, factors=(u.float(), v.float())))
            notes.append(note)
            made.enter_context(rewritten(model, rewrites[-1]))
    return rewrites, notes
