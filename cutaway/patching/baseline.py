"""What stands in for a removed activation, and the random steps of equal length that a removal is compared with.

* `corrupt`: the value in the same prompt's corrupt partner; removes what tells the two apart, and nothing else.
* `zero`: zeros. Outside of what the model has seen: later layers also lose the activation's mean.
* `mean`: one value, the mean over all tokens of the task's clean prompts.
* `position_mean`: the mean over prompts at each position; needs prompts of one length that line up.
* `resample`: the value in another prompt of the task (a fixed seeded derangement); needs prompts of one length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address, parse, unit_axis
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.models.capture import Activations
from cutaway.models.edits import Edit, Replace
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.bound import Bound

Baseline = Literal["corrupt", "zero", "mean", "position_mean", "resample"]

SAYS = {
    "corrupt": "the value in the prompt's corrupt partner",
    "zero": "zeros",
    "mean": "the mean over all tokens of the clean prompts",
    "position_mean": "the mean over the clean prompts at each position",
    "resample": "the value in another clean prompt",
}


@dataclass(frozen=True)
class Removal:
    """The clean run (`own`), what stands in for its activations (`stand`), and the metric without any removal."""

    bound: Bound
    own: Activations
    stand: Activations
    clean: Float[Tensor, "prompt"]
    how: str

    def edit(self, a: Address) -> Edit:
        """Remove one component or place."""
        return Replace(a, self.stand[str(a)])

    def random(self, a: Address, seed: int) -> Edit:
        """A step as long as the removal's, in a random direction."""
        return RandomStep(a, self.own[str(a)], self.stand[str(a)], seed)

    def notes(self) -> dict[str, Any]:
        """What the record says beyond the options."""
        notes = {"stands in": SAYS[self.how], "unablated": float(self.clean.mean()), "sign": "positive is more answer"}
        return notes | ({} if len(self.bound) > 1 else {"no_interval": "one prompt"})


def removal(model: Model, bound: Bound, sites: Sequence[Address], how: Baseline) -> Removal:
    """Run a task's clean prompts, capture the sites, and find what stands in for them.

    Raises:
        Refused: a baseline that these prompts do not allow, or prompts on which the metric is not finite.
    """
    clean = bound.metric(model.run_last(bound.clean)).float()
    if not bool(clean.isfinite().all()):
        raise Refused("ablation", "the metric is not finite", "use a wider dtype or other prompts")
    places = list(dict.fromkeys(a.place for a in sites))
    own = model.capture(bound.clean, places, logits=False)
    if how == "corrupt":
        stand = model.capture(bound.corrupt, places, logits=False)
    else:
        stand = Activations({a: _stand(own[str(a)], bound.clean, how) for a in places}, bound.clean)
    return Removal(bound, own, stand, clean, how)


@dataclass(frozen=True)
class RandomStep(Edit):
    """Add a step of the length `donor − own` in a random direction, drawn only when the edit is made.

    A step of one neuron or channel has one dimension, so only its sign is random. States keep each channel's length.
    """

    address: Address | str
    own: Float[Tensor, "..."] = field(repr=False)
    donor: Float[Tensor, "..."] = field(repr=False)
    seed: int
    positions: tuple[int, ...] | None = None

    def change(self, old: Tensor) -> Tensor:
        a, step = parse(self.address), self.donor.float() - self.own.float()
        noise = torch.randn(step.shape, generator=generator(self.seed)).to(step.device)
        if a.unit is not None and a.row.axes.split()[-1] == unit_axis(a.row):
            noise = noise.sign() * step.abs()
        else:
            noise *= step.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return self._fitting(old + noise.to(old.device), old)


def _stand(x: Float[Tensor, "batch position *rest"], tokens: Tokens, how: str) -> Float[Tensor, "batch position *rest"]:
    if how == "zero":
        return torch.zeros_like(x)
    if how == "mean":
        return x[tokens.mask.to(x.device)].float().mean(0).to(x.dtype).expand(x.shape)
    if tokens.padded or len(tokens) < 2:
        why = "the prompts differ in length" if tokens.padded else "there is one prompt"
        raise Refused(f"{how} ablation", why, "use how='corrupt' or 'mean', or prompts of one length")
    if how == "position_mean":
        return x.float().mean(0, keepdim=True).to(x.dtype).expand(x.shape)
    return x[derangement(len(x))]


def derangement(n: int) -> list[int]:
    """For each of `n` prompts another one, the same at every call."""
    order = torch.randperm(n, generator=generator(0)).tolist()
    giver = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [giver[i] for i in range(n)]
