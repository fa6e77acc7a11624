"""Values that replace an ablated activation, and the random steps of equal length that an ablation is compared with.

* `corrupt`: the value in the same prompt's corrupt partner; removes what tells the two apart, and nothing else.
* `zero`: zeros. Outside of what the model has seen: later layers also lose the activation's mean.
* `mean`: one value, the mean over the tokens of the task's clean prompts. Each prompt's first token and special tokens
  before its last are neither averaged in nor replaced, unless `sinks`: attention rests there, and their activations
  can be ten times as long as all others.
* `position_mean`: the mean at each position over the clean prompts of the same length.
* `resample`: the value at the same position in another clean prompt of the same length, mean effect over several.

The last two leave out prompts whose length no other prompt has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.core.address import Address, parse, unit_axis
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.stats import generator
from cutaway.interventions.paired_runs import first_changed
from cutaway.models.access.capture import Activations
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edit import Edit, at_places, fitting
from cutaway.models.edits.library import Add, Replace
from cutaway.models.model import Model
from cutaway.models.sweep.executor import Metric, sweep
from cutaway.models.tokens import Tokens
from cutaway.models.vocabulary import special_ids
from cutaway.tasks.bound import Bound

Baseline = Literal["corrupt", "zero", "mean", "position_mean", "resample"]

SAYS = {
    "corrupt": "the value in the prompt's corrupt partner",
    "zero": "zeros",
    "mean": "the mean over the tokens of the clean prompts",
    "position_mean": "the mean at each position over the clean prompts of the same length",
    "resample": "the value at the same position in another clean prompt of the same length",
}
DONORS = 4  # other prompts that each prompt is given values of by `resample`


@dataclass(frozen=True)
class Removal:
    """The clean run (`own`), what stands in for its activations, once a donor, and the metric without any removal."""

    bound: Bound
    own: Activations
    stands: tuple[Activations, ...]
    clean: Float[Tensor, "prompt"]
    says: dict[str, Any]
    since: int = 0  # the first position at which what stands in differs

    def edit(self, a: Address, donor: int = 0) -> Edit:
        """Remove one component or place."""
        return Replace(a, self._stand(donor)[str(a)], since=self.since)

    def random(self, a: Address, seed: int, donor: int = 0) -> Edit:
        """Return a step as long as the removal's, in a random direction."""
        return RandomStep(a, self.own[str(a)], self._stand(donor)[str(a)], seed, since=self.since)

    def swept(
        self,
        model: Model,
        variants: Callable[[int], Sequence[Sequence[Edit]]],
        chance: Sequence[Sequence[Edit]] = (),
        measure: Metric | None = None,
    ) -> tuple[Float[Tensor, "variant prompt *metric"], Float[Tensor, "chance prompt *metric"]]:
        """Return the metric under `variants(donor)`, mean over donors, and under the edits of a control, made once."""
        each = [[list(v) for v in variants(d)] for d in range(len(self.stands))]
        made = [v for part in each for v in part]
        values = sweep(model, self.bound.clean, [*made, *chance], measure or self.bound.measure)
        values = values.float().cpu()
        mean = values[: len(made)].reshape(len(each), -1, *values.shape[1:]).mean(0)
        return mean, values[len(made) :]

    def record(self) -> dict[str, Any]:
        """Return the entries of the record beyond the options."""
        return self.says | {"unablated": float(self.clean.mean()), "sign": "positive is more answer"}

    def _stand(self, donor: int) -> Activations:
        return self.stands[donor % len(self.stands)]


def removal(
    model: Model, bound: Bound, sites: Sequence[Address], how: Baseline, seed: int = 0, sinks: bool = False
) -> Removal:
    """Run a task's clean prompts, capture the sites, and find what stands in for them.

    The removal's `bound` has fewer prompts than the given one where `how` cannot serve all. `seed` draws the donors.

    Raises:
        Refused: a baseline that these prompts do not allow, or prompts on which the metric is not finite.
    """
    groups, says = [list(range(len(bound)))], {"stands in": SAYS[how]}
    if how in ("position_mean", "resample"):
        bound, groups, left = _alike(bound, how)
        says |= {"left out": left} if left else {}
    clean = model.measure(bound.clean, bound.measure).float()
    if not bool(clean.isfinite().all()):
        raise Refused("ablation", "the metric is not finite", "use a wider dtype or other prompts")
    places = list(dict.fromkeys(a.place for a in sites))
    own = model.capture(bound.clean, places, logits=False)
    if how == "corrupt":
        stands = (model.capture(bound.corrupt, places, logits=False),)
    elif how == "resample":
        donors = derangements(groups, DONORS, seed)
        says["donors"] = (
            f"{len(donors)} a prompt, of which the effect is the mean" if len(donors) > 1 else "one a prompt"
        )
        stands = tuple(Activations({a: own[str(a)][d] for a in places}, bound.clean) for d in donors)
    else:
        where = ordinary(model, bound.clean, sinks) if how == "mean" else bound.clean.mask
        says |= {"left in place": SINKS} if how == "mean" and not sinks else {}
        stands = (Activations({a: _stand(own[str(a)], where, groups, how) for a in places}, bound.clean),)
    return Removal(bound, own, stands, clean, says, first_changed(model, bound) if how == "corrupt" else 0)


def without_sinks(model: Model, tokens: Tokens) -> Bool[Tensor, "batch position"]:
    """Return the tokens without each prompt's first one, and without special ones before its last."""
    special = torch.isin(tokens.ids, special_ids(model.tokenizer).to(tokens.ids.device))
    special.scatter_(1, tokens.last[:, None], False)
    where = tokens.mask & ~special
    return where.scatter_(1, tokens.column(0)[:, None], False)


SINKS = "each prompt's first token, and special tokens before its last"


def ordinary(model: Model, tokens: Tokens, sinks: bool = False) -> Bool[Tensor, "batch position"]:
    """Return the tokens that a mean is taken over and that it replaces; with `sinks` all, else without first and
    special ones.

    A special token at the end stays in: the answer is read there.

    Raises:
        Refused: there is none.
    """
    if sinks:
        return tokens.mask
    where = without_sinks(model, tokens)
    if not bool(where.any()):
        raise Refused(
            "mean ablation",
            "the prompts have one token each, which a mean leaves in place",
            ("use ", Keyword("how", "zero")),
        )
    return where


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
    since: int = 0

    def select_prompts(self, prompts: BatchSlice) -> Edit:
        return Add(self.address, prompts.tensor(self.step(), self.axes()), positions=self.positions, since=self.since)

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        return at_places(self, x, frame, lambda old: old + fitting(self, self.step(), old))

    def step(self) -> Float[Tensor, "..."]:
        """Return the step added to every prompt, the same at every call."""
        a, step = parse(self.address), self.donor.float() - self.own.float()
        noise = torch.randn(step.shape, generator=generator(self.seed)).to(step.device)
        if a.unit is not None and a.row.axes.split()[-1] == unit_axis(a.row):
            noise = noise.sign() * step.abs()
        else:
            noise *= step.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return noise


def stand_in(
    x: Float[Tensor, "batch position *rest"], where: Bool[Tensor, "batch position"], how: str
) -> Float[Tensor, "*rest"]:
    """Return the one value that stands in for an activation: zeros, or its mean over the tokens at which `where` is
    True.
    """
    if how == "zero":
        return torch.zeros_like(x[0, 0])
    return x[where.to(x.device)].float().mean(0).to(x.dtype)


def removals(
    model: Model, tokens: Tokens, sets: Sequence[Sequence[Address]], how: Literal["zero", "mean"]
) -> list[list[Edit]]:
    """Return the edits that remove each set of heads at every token, without a task.

    Means are of the `ordinary` tokens, and stand in at these alone.
    """
    places = sorted({a.place for heads in sets for a in heads})
    stands, where = dict[Address, Tensor](), ordinary(model, tokens) if how == "mean" else tokens.mask
    own = model.capture(tokens, places, logits=False) if places else {}
    for a in places:
        x = own[str(a)].clone()
        x[where.to(x.device)] = stand_in(x, where, how)
        stands[a] = x
    return [[Replace(a, stands[a.place][:, :, a.unit]) for a in heads] for heads in sets]


def _stand(
    x: Float[Tensor, "batch position *rest"], where: Bool[Tensor, "batch position"], groups: list[list[int]], how: str
) -> Float[Tensor, "batch position *rest"]:
    if how == "zero":
        return torch.zeros_like(x)
    out, where = x.clone(), where.to(x.device)
    if how == "mean":
        out[where] = stand_in(x, where, how)
        return out
    for rows in groups:
        out[rows] = x[rows].float().mean(0).to(x.dtype)
    return out


def _alike(bound: Bound, how: str) -> tuple[Bound, list[list[int]], str]:
    """Return the prompts that share their length with another, in groups of one length, and what was left out, in
    words.
    """
    groups = [rows for rows in bound.clean.by_length().values() if len(rows) > 1]
    kept = sorted(i for rows in groups for i in rows)
    if not kept:
        why = "there is one prompt" if len(bound) == 1 else "no two prompts have the same length"
        raise Refused(
            f"{how} ablation", why, ("use ", Keyword("how", "corrupt"), " or 'mean', or prompts of one length")
        )
    gone = len(bound) - len(kept)
    left = f"{gone} of {len(bound)} prompts, whose length no other has" if gone else ""
    if len(groups) == 1:  # without padding
        some = next(p for p in bound.buckets() if len(p) > 1)
    else:
        some = bound.rows(kept) if left else bound
    return some, sorted(some.clean.by_length().values()), left  # in order: draws stay


def derangements(groups: Sequence[Sequence[int]], count: int, seed: int) -> list[list[int]]:
    """For each prompt another one of its group, up to `count` times, each time another as far as the group reaches."""
    orders = [[g[i] for i in torch.randperm(len(g), generator=generator(seed)).tolist()] for g in groups]
    out = list[list[int]]()
    for k in range(min(count, max(map(len, groups)) - 1)):
        giver = dict[int, int]()
        for order in orders:
            step = 1 + k % (len(order) - 1)
            giver |= {a: order[(i + step) % len(order)] for i, a in enumerate(order)}
        out.append([giver[i] for i in range(len(giver))])
    return out
