"""Optimal constants: the value that, standing in for a component, costs the model least.

Li & Janson 2024 (arXiv:2409.09951): a* = argmin_a E KL(model ‖ model with the component held at a), here over the
next-token distributions at the last position. Fitted by Adam from the component's mean, a layer's components in one
batch, each by gradients of its own rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.models.access.capture import Activations
from cutaway.models.dry import some
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

_ROWS = 256  # rows of one batch
_RATE = 0.1  # of Adam, in standard deviations of the activation


def optimal_constants(
    model: Model, tokens: Tokens, where: Bool[Tensor, "batch position"], places: list[Address], steps: int
) -> tuple[dict[Address, Float[Tensor, "width"]], Float[Tensor, "place step"]]:
    """Fit the constant of each head or layer site, put in at `where`; returns them and the loss [place, step]."""
    own = model.capture(tokens, list(dict.fromkeys(a.place for a in places)), logits=False)
    target = model.run_last(tokens).float().log_softmax(-1)
    found: dict[Address, Tensor] = {}
    curves = list[Tensor]()
    size = max(1, _ROWS // len(tokens))
    batches = list[list[Address]]()
    for place in dict.fromkeys(a.place for a in places):
        units = [a for a in places if a.place == place]
        batches += [units[at : at + size] for at in range(0, len(units), size)]
    for units in some(batches, 1):
        constants, curve = _fit(model, tokens, where, units, own, target, steps)
        found |= dict(zip(units, constants, strict=True))
        curves.append(curve)
    for a in [a for units in batches for a in units if a not in found]:  # those that a dry run leaves out
        found[a] = _unit(own[str(a.place)], a)[where.to(own[str(a.place)].device)].float().mean(0)
        curves.append(curves[0][:1])
    return found, torch.cat(curves)


def _fit(
    model: Model,
    tokens: Tokens,
    where: Bool[Tensor, "batch position"],
    units: list[Address],
    own: Activations,
    target: Float[Tensor, "batch token"],
    steps: int,
) -> tuple[Float[Tensor, "place width"], Float[Tensor, "place step"]]:
    """Return the constants of some units of one place; each has a copy of the prompts as its rows."""
    n, place = len(tokens), units[0].place
    where = where.to(own[str(place)].device)
    seen = torch.stack([own[str(a)][where].float() for a in units])  # unit token width
    constants, spread = seen.mean(1), seen.std(1, correction=0).mean(-1).clamp_min(1e-6)
    optimiser = torch.optim.Adam([constants], lr=_RATE)
    copies, wanted, curve = tokens.rows(list(range(n)) * len(units)), target.repeat(len(units), 1), []

    def loss(logits: Tensor) -> Tensor:
        return (wanted.exp() * (wanted - logits.float().log_softmax(-1))).sum(-1)

    for step in some(range(steps), 1):
        value = own[str(place)].repeat(len(units), *[1] * (own[str(place)].ndim - 1))
        for block, (a, c) in enumerate(zip(units, constants, strict=True)):
            _unit(value[block * n : (block + 1) * n], a)[where] = c
        losses, slopes, _ = model.gradients(copies, place, loss, Replace(place, value.requires_grad_(True)))
        curve.append(losses.reshape(len(units), n).mean(1))
        each = slopes[str(place)].float()
        blocks = [_unit(each[block * n : (block + 1) * n], a) for block, a in enumerate(units)]
        # In units of the spread, so that one rate fits every layer; Adam's step has the size of its rate.
        constants.grad = torch.stack([b[where].sum(0) / n for b in blocks])
        optimiser.param_groups[0]["lr"] = _RATE * (1 - step / steps)
        before = constants.clone()
        optimiser.step()
        constants.copy_(before + (constants - before) * spread[:, None])
    return constants, torch.stack(curve + curve[-1:] * (steps - len(curve)), dim=1)


def _unit(x: Tensor, a: Address) -> Tensor:
    """Return one head's part of a site's tensor, or all of it."""
    return x if a.unit is None else x[:, :, a.unit]
