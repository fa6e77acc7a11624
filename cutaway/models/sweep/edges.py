"""Sweeps over edges: many edge patches of the same prompts as one plan.

A first pass runs each sender from its own layer on, with what its patch freezes, and keeps what the receivers read; the
second puts that into the run that is patched, from the receivers on. Edges to the logits need the first pass only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.out_of_memory import in_halves
from cutaway.core.record import counting
from cutaway.models.access import taps
from cutaway.models.access.capture import Activations
from cutaway.models.dry import Planned, Took, planned
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
        if (dry := planned()) is not None:
            return _a_few(
                model, tokens, patches, {key: members for key, members in alike.items() if key[1]}, clean, dry
            )
        for (layer, ends, _), members in sorted(alike.items(), key=lambda item: item[0][0]):
            if not ends:
                continue  # no receiver reads these senders

            def run(some: Sequence[int], layer: int = layer, ends: tuple[Address, ...] = ends) -> None:
                edits = _received(model, tokens, [patches[i] for i in some], layer, ends, clean)
                for i, own in zip(some, edits, strict=True):
                    found[i] = own

            in_halves(members, size, run)
    return found


def _a_few(
    model: Model,
    tokens: Tokens,
    patches: Sequence[EdgePatch],
    alike: Mapping[tuple[int, tuple[Address, ...], tuple[int, ...]], list[int]],
    clean: Clean,
    dry: Planned,
) -> list[list[Edit]]:
    """Return made-up inputs of receivers, from those of the first senders alone, and enter what the others take."""
    found: list[list[Edit]] = [[] for _ in patches]
    if not alike:
        return found
    layer, ends, _ = first = min(alike, key=lambda key: key[0])
    ran, heard = list[Took](), list[Edit]()
    for few in (alike[first][:1], alike[first][1:8]):
        if few:
            with counting() as spent:
                heard = _received(model, tokens, [patches[i] for i in few], layer, ends, clean)[0]
            ran.append(Took(1, spent.forwards, spent.seconds))
    layers = model.shape.n_layers
    whole = sum(len(members) * (1 - low / layers) for (low, _, _), members in alike.items()) * len(tokens)
    size = max(1, room(model, tokens.ids.shape[1]) // tokens.ids.numel())
    jobs = sum(-(-len(members) // size) for members in alike.values())
    dry.sweep(whole - sum(t.forwards for t in ran), jobs - len(ran), ran)
    for (_, own, _), members in alike.items():
        for i in members:
            found[i] = [e for e in heard if e.where in own]
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
    return [[Replace(a, y[str(a)], since=p.sender.since) for a in ends] for p, y in zip(patches, parts, strict=True)]
