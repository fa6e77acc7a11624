"""Sweeps over edges: many edge patches of the same prompts as one plan.

A first pass runs each sender from its own layer on, with what its patch freezes, and keeps what the receivers read; the
second puts that into the run that is patched, from the receivers on. Edges to the logits need the first pass only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.out_of_memory import in_halves
from cutaway.models.access import taps
from cutaway.models.access.capture import Activations
from cutaway.models.edits.edges import EdgePatch
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.sweep.executor import Metric, sweep
from cutaway.models.sweep.partial_forward import Clean, clean_run, restart
from cutaway.models.sweep.plan import room
from cutaway.models.tokens import Tokens


def sweep_edges(
    model: Model, tokens: Tokens, patches: Sequence[EdgePatch], metric: Metric
) -> Float[Tensor, "patch batch *metric"]:
    """Measure the metric of every prompt under every edge patch; as `sweep` does for edits.

    Raises:
        Refused: a place that the model does not have, or what `sweep` refuses.
    """
    model.places([a for p in patches for edge in p.edges for a in (edge.source, edge.target) if isinstance(a, Address)])
    through: dict[tuple[int, ...], list[int]] = {}  # patches to the logits, by what they freeze
    inside = list[int]()
    for i, p in enumerate(patches):
        if p.edges[0].target == Address("logits"):
            through.setdefault(tuple(map(id, p.frozen)), []).append(i)
        else:
            inside.append(i)
    parts = [
        (found, sweep(model, tokens, [[patches[i].sender] for i in found], metric, base=patches[found[0]].frozen))
        for found in through.values()
    ]
    if inside:
        heard = _heard(model, tokens, [patches[i] for i in inside])
        parts.append((inside, sweep(model, tokens, heard, metric)))
    if not parts:
        return torch.empty(0, len(tokens), device=model.device)
    order = torch.tensor([i for found, _ in parts for i in found], device=parts[0][1].device)
    return torch.cat([values for _, values in parts])[order.argsort()]


def _heard(model: Model, tokens: Tokens, patches: Sequence[EdgePatch]) -> list[list[Edit]]:
    """Return the inputs of each patch's receivers in its first run, as edits."""
    alike: dict[tuple[int, tuple[Address, ...], tuple[int, ...]], list[int]] = {}
    for i, p in enumerate(patches):
        key = p.sender.where.layer or 0, tuple(p.heard(model.anatomy)), tuple(map(id, p.frozen))
        alike.setdefault(key, []).append(i)
    found: list[list[Edit]] = [[] for _ in patches]
    size = room(model, tokens.ids.shape[1]) // tokens.ids.numel()
    with model.edited(), torch.no_grad():
        clean = clean_run(model, tokens, sorted({layer for layer, _, _ in alike}), keys=False)
        for (layer, ends, _), members in sorted(alike.items(), key=lambda item: item[0][0]):
            if not ends:
                continue  # no receiver reads these senders

            def run(some: Sequence[int], layer: int = layer, ends: tuple[Address, ...] = ends) -> None:
                edits = _received(model, tokens, [patches[i] for i in some], layer, ends, clean)
                for i, own in zip(some, edits, strict=True):
                    found[i] = own

            in_halves(members, size, run)
    return found


def _received(
    model: Model, tokens: Tokens, patches: Sequence[EdgePatch], layer: int, ends: Sequence[Address], clean: Clean
) -> list[list[Edit]]:
    """Run senders of one layer, what is frozen being alike, and keep what the receivers read."""
    later = [e for e in patches[0].frozen if e.where.layer is None or e.where.layer >= layer]
    seen = dict[Address, Tensor]()

    def keep(place: Address) -> taps.See:
        def see(x: Tensor) -> Tensor:
            seen[place] = x.clone()
            return x

        return see

    with taps.attached(model.anatomy, {a.place: keep(a.place) for a in ends}):
        restart(model, tokens, [[*later, p.sender] for p in patches], layer, clean)
    n = len(tokens)
    parts = [Activations({p: x[i * n : (i + 1) * n] for p, x in seen.items()}, tokens) for i in range(len(patches))]
    return [[Replace(a, part[str(a)]) for a in ends] for part in parts]
