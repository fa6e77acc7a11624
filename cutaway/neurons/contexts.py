"""Contexts in which units fire most: the largest activations on texts, found batch by batch, and contexts as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.interventions.ablation_values import without_sinks
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.models.watching import watched
from cutaway.neurons import memories

HALVES = ["chose", "held out"]
_BEFORE = 8  # tokens of a context that are shown before the one that it ends in
#: takes a layer's activations [batch position neuron] and returns those of the units asked about [batch position unit]
Units = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Found:
    """The contexts of some units of one layer, the largest activations first.

    Attributes:
        activation: the activations; −∞ where there are fewer.
        place: the places, counted through the padded batch; −1 where there are fewer.
    """

    activation: Float[Tensor, "half rank unit"]
    place: Int[Tensor, "half rank unit"]


def once(tokens: Tokens) -> Tokens:
    """Return prompts without those that are there already."""
    return tokens.rows(sorted({*tokens.firsts()}))


def halves(model: Model, tokens: Tokens) -> list[Bool[Tensor, "batch position"]]:
    """Return the tokens of every second text, and of the others: without first, special and last ones.

    Raises:
        Refused: no text of the first half has any.
    """
    where = without_sinks(model, tokens).scatter(1, tokens.last[:, None], False).cpu()
    parts = [where & (torch.arange(len(tokens)) % 2 == i)[:, None] for i in (0, 1)]
    if not bool(parts[0].any()):
        raise Refused(
            "contexts of neurons", "no text of the first half has a token between others", "give longer texts"
        )
    return parts


def room(parts: Sequence[Bool[Tensor, "batch position"]]) -> int:
    """Return the number of tokens of the smaller half, or of the one that there is."""
    return min(n for h in parts if (n := int(h.sum())))


def largest(
    model: Model, tokens: Tokens, units: Mapping[int, Units], parts: Sequence[Bool[Tensor, "batch position"]], k: int
) -> dict[int, Found]:
    """Return the `k` largest activations of each half of the texts, for units of every layer, from one forward."""
    width, best = tokens.ids.shape[1], dict[tuple[int, int], tuple[Tensor, Tensor]]()

    def see(layer: int, own: Sequence[Tensor], whole: Sequence[Tensor], x: Tensor) -> Tensor:
        acts = units[layer](x.detach()).float().flatten(0, 1)
        none = acts.new_full((k, acts.shape[1]), -torch.inf)
        for h, (at, places) in enumerate(zip(own, whole, strict=True)):
            before, told = best.get((h, layer), (none, torch.full_like(none, -1, dtype=torch.long)))
            both = torch.cat([before, acts[at.to(x.device)]]).topk(k, dim=0)
            every = torch.cat([told, places.to(x.device)[:, None].expand(-1, acts.shape[1])])
            best[h, layer] = both.values, every.gather(0, both.indices)
        return x

    for rows in memories.batches(model, tokens):
        own = [half[rows].flatten().nonzero()[:, 0] for half in parts]  # places in this batch of texts
        starts = (torch.tensor(rows)[:, None] * width + torch.arange(width)).flatten()
        sees = {Address("mlp_post", i): partial(see, i, own, [starts[at] for at in own]) for i in units}
        watched(model, tokens.rows(rows), sees)
    found = {i: [best[h, i] for h in range(len(parts))] for i in units}
    return {
        i: Found(*(torch.stack([x.cpu() for x in side]) for side in zip(*f, strict=True))) for i, f in found.items()
    }


def text(model: Model, tokens: Tokens, place: int) -> str:
    """Return the context of a place, counted through the padded batch: some tokens, and the one there in ⟦ ⟧; "" for a
    place of −1.
    """
    if place < 0:
        return ""
    row, column = divmod(place, tokens.ids.shape[1])
    first = max(int(tokens.column(0)[row]), column - _BEFORE)
    parts = model.text.token_texts(tokens.ids[row, first : column + 1], running=True)
    return "".join(parts[:-1]) + f"⟦{parts[-1]}⟧"


def texts(model: Model, tokens: Tokens, places: Int[Tensor, "half rank neuron"]) -> list[list[list[str]]]:
    """Return the contexts of every half and neuron as text."""
    return [[[text(model, tokens, at) for at in row] for row in half.T.tolist()] for half in places]


def read_at(
    model: Model, tokens: Tokens, places: Mapping[int, Int[Tensor, "place"]]
) -> dict[int, Float[Tensor, "place d_model"]]:
    """Return what the MLP of every layer reads at some places, counted through the padded batch, from one forward."""
    width, found = tokens.ids.shape[1], {i: torch.empty(len(p), model.shape.d_model) for i, p in places.items()}

    def see(layer: int, own: Tensor, where: Tensor, x: Tensor) -> Tensor:
        found[layer][where] = x.detach().flatten(0, 1)[own.to(x.device)].float().cpu()
        return x

    for rows in memories.batches(model, tokens):
        starts = (torch.tensor(rows)[:, None] * width + torch.arange(width)).flatten()
        sees = dict[Address, Callable[[Tensor], Tensor]]()
        for i, wanted in places.items():
            own, where = (starts[:, None] == wanted).nonzero(as_tuple=True)
            sees[Address("mlp_in", i)] = partial(see, i, own, where)
        watched(model, tokens.rows(rows), sees)
    return found
