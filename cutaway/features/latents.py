"""Which latents of a dictionary carry the difference between the clean and the corrupt prompt?

Activation patching in the basis of a dictionary (Marks et al. 2024, arXiv:2403.19647, exact instead of linearised): one
latent takes its value of the other run, and the reconstruction error stays what it was.

* The step of latent i at a token: decode(f with f_i exchanged) − decode(f), added at the sites that the dictionary
  writes. `effect` = metric(with the step) − metric(without), mean over prompts; positive means more answer. `recovered`
  is its share of clean − corrupt. [latent] exchanges a latent at all positions, `by="position"` at each: [latent
  position].
* `latents` names them; otherwise the `top` ones by |first-order estimate| (`estimate`: gradient · step, all latents
  from one backward pass) are measured. What is not measured is not claimed to be zero.
* `whole`: every latent exchanged at once; `error`: the reconstruction error exchanged instead. A dictionary explains
  the difference as far as `whole` is near the effect of the whole activation and `error` is near zero.
* `interval`: 95 %, over prompts. Control (`null`): at the same tokens a step of the same length along another,
  random latent of the dictionary.
* Known failures: latents that stand in for each other hide each other; the choice by estimate misses saturated ones;
  a latent is no feature before its contexts have been looked at.
* Equivalences (tests): the steps of all latents add up to `whole`; with the error exchanged too they are
  `patching.activation` of the whole site.
* Cost: 5 forwards, 1 backward, and 1 + samples forwards a latent (and position).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.dictionary import Dictionary, place_of
from cutaway.interventions.components import positions
from cutaway.interventions.effects import Effects
from cutaway.interventions.paired_runs import Direction, PairedRuns, between, difference
from cutaway.interventions.spans import position_names
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Add
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.task import Task

Steps = dict[str, Float[Tensor, "batch position width"]]


@method(
    answers="Which latents of a dictionary carry the difference between the clean and the corrupt prompt?",
    paper="Marks et al. 2024, arXiv:2403.19647",
    cost="prompts * ((9 + (1 + samples) * latent * max(position, 1)) * F + B)",
    control="random_latent",
    rung="interventional",
    fills=("recovered", "estimate", "whole", "error", "corrupt", "gap"),
)
def latents(
    model: Model,
    task: Task,
    dictionary: Dictionary,
    /,
    *,
    top: int = 16,
    latents: tuple[int, ...] = (),
    by: Literal["all", "position"] = "all",
    direction: Direction = "denoise",
    samples: int = 4,
    seed: int = 0,
) -> Effects:
    """Exchange one latent at a time between the clean and the corrupt run.

    Args:
        top: how many latents are measured, the largest estimates first.
        latents: their numbers instead, such as 17,512.
        by: exchange a latent at all positions at once, or at each position.
        direction: denoise patches clean values into the corrupt run, noise corrupt values into the clean run.
        samples: how many random latents' steps of equal length make the null of each.
        seed: of the random latents.

    Raises:
        Refused: a latent that is not there, or a corruption that does not change the metric.
    """
    bound = task.bind(model)
    sites = list(dict.fromkeys([*dictionary.reads, *dictionary.writes]))
    x = between(model, bound, sites, direction, task.corruption)
    difference(task, x.clean, x.corrupt)
    codes = [encoded(dictionary, acts) for acts in (x.own, x.donor)]
    guess = _estimates(model, dictionary, x, codes)
    chosen = _named(dictionary, latents) if latents else _largest(guess, top)
    step = Stepper(dictionary, x, codes)
    places: list[int | None] = [None] if by == "all" else [*positions(bound.clean)]
    whole, error = step.whole()
    real = [step_edits(step.of(i), p, x.target) for i in chosen for p in places]
    chance, null = generator(seed), []
    for _ in range(samples):
        others = torch.randint(dictionary.n_latents, (len(chosen),), generator=chance).tolist()
        null += [step_edits(step.along(i, j), p, x.target) for i, j in zip(chosen, others, strict=True) for p in places]
    variants = [step_edits(whole, None, x.target), step_edits(error, None, x.target), *real, *null]
    values = (sweep(model, x.target, variants, bound.measure) - x.baseline).float().cpu()
    return _result(model, x, chosen, by, guess, values, samples)


def encoded(d: Dictionary, acts: Mapping[str, Tensor]) -> SparseCode:
    """Return the code of captured activations, one row a token."""
    return d.encode({s: acts[s].flatten(0, 1).flatten(1) for s in d.reads})


class Stepper:
    """Steps at the written sites that exchanging latents would make."""

    def __init__(self, d: Dictionary, x: PairedRuns, codes: Sequence[SparseCode]):
        self.d, self.x, (self.own, self.donor) = d, x, codes
        self.reads = {s: x.own[s].flatten(0, 1).flatten(1) for s in d.reads}
        self.now = self._decoded(self.own)

    def of(self, latent: int) -> Steps:
        """Return the steps by which one latent takes the other run's values."""
        return self._shaped(self._change(latent))

    def along(self, latent: int, other: int) -> Steps:
        """As long a step as `of` makes at each token, along another latent's."""
        wanted = {s: t.norm(dim=-1, keepdim=True) for s, t in self._change(latent).items()}
        b, _ = place_of(self.d, other)
        unit = self._decoded(self.own.put([other], self.own.columns([other]) + 1.0))
        given = {s: t - self.now[s] for s, t in unit.items()}
        if not all(float(given[s].norm()) for s in wanted if s in self.d.blocks[b].writes):
            return self._shaped({s: torch.zeros_like(t) for s, t in given.items()})
        sizes = {s: g.norm(dim=-1, keepdim=True).clamp_min(1e-12) for s, g in given.items()}
        return self._shaped({s: g / sizes[s] * wanted[s] for s, g in given.items()})

    def whole(self) -> tuple[Steps, Steps]:
        """Return the steps that exchange every latent, and those that exchange only the reconstruction error."""
        d = self.d
        given = {s: self.x.donor[s].flatten(0, 1).flatten(1) for s in d.reads}
        there = d.decode(self.donor, given)
        there = {d.writes[0]: there} if isinstance(there, Tensor) else there
        latents = {s: t - self.now[s] for s, t in self._decoded(self.donor).items()}
        flat = {s: [a[s].flatten(0, 1).flatten(1) for a in (self.x.own, self.x.donor)] for s in d.writes}
        error = {s: (new - there[s]) - (old - self.now[s]) for s, (old, new) in flat.items()}
        return self._shaped(latents), self._shaped(error)

    def _change(self, latent: int) -> dict[str, Tensor]:
        new = self._decoded(self.own.put([latent], self.donor.columns([latent])))
        return {s: t - self.now[s] for s, t in new.items()}

    def _decoded(self, code: SparseCode) -> dict[str, Tensor]:
        out = self.d.decode(code, self.reads)
        return {self.d.writes[0]: out} if isinstance(out, Tensor) else dict(out)

    def _shaped(self, steps: Mapping[str, Tensor]) -> Steps:
        return {s: t.reshape(self.x.own[s].shape).to(self.x.own[s].dtype) for s, t in steps.items()}


def step_edits(steps: Steps, position: int | None, tokens: Tokens) -> list[Edit]:
    """Return the edits that add steps to their sites, at one position or at all."""
    if position is None:
        return [Add(s, t) for s, t in steps.items()]
    rows, column = torch.arange(len(tokens)), tokens.column(position).cpu()
    return [Add(f"{s}@{position}", t[rows, column]) for s, t in steps.items()]


def _estimates(
    model: Model, d: Dictionary, x: PairedRuns, codes: Sequence[SparseCode]
) -> Float[Tensor, "prompt latent"]:
    """First-order effect of every latent's step, prompt by prompt."""
    _, slopes, _ = model.gradients(x.target, list(d.writes), x.bound.measure)
    change = codes[1].dense() - codes[0].dense()
    total = torch.zeros_like(change)
    for b, block in enumerate(d.blocks):
        span = slice(d.starts[b], d.starts[b + 1])
        for s in block.writes:
            g = slopes[s].flatten(0, 1).flatten(1).to(change.dtype)
            total[:, span] += change[:, span] * (g @ d.decoder[b][s].to(change.dtype).T)
    return total.reshape(len(x.bound), -1, d.n_latents).sum(1).float()


def _largest(guess: Float[Tensor, "prompt latent"], n: int) -> list[int]:
    size = guess.mean(0).abs()
    n = min(n, int((size > 0).sum()))
    if n < 1:
        raise Refused(
            "exchanging latents", "no latent differs between the two runs", ("name them with ", Keyword("latents"))
        )
    return size.topk(n).indices.tolist()


def _named(d: Dictionary, latents: Sequence[int]) -> list[int]:
    for latent in latents:
        place_of(d, latent)
    return list(dict.fromkeys(latents))


def _result(
    model: Model, x: PairedRuns, chosen: Sequence[int], by: str, guess: Tensor, values: Tensor, samples: int
) -> Effects:
    whole, error = values[0].mean(), values[1].mean()
    cells = (len(values) - 2) // (1 + samples)
    each, null = values[2 : 2 + cells], values[2 + cells :].mean(-1).reshape(samples, cells).T
    shape = (len(chosen),) if by == "all" else (len(chosen), cells // len(chosen))
    labels: dict[str, list[Any]] = {"latent": list(chosen), "bound": BOUNDS}
    labels |= {} if by == "all" else {"position": position_names(x.bound)}
    unit, mean = x.bound.unit, each.mean(-1)
    return Effects(
        grid=("latent",) if by == "all" else ("latent", "position"),
        effect=mean.reshape(shape),
        interval=mean_interval(each.T).reshape(*shape, 2),
        null=null.reshape(*shape, samples),
        recovered=(mean / x.gap).reshape(shape),
        estimate=guess.mean(0)[list(chosen)].cpu(),
        whole=whole,
        error=error,
        clean=x.clean.cpu(),
        corrupt=x.corrupt.cpu(),
        labels=labels,
        units=dict.fromkeys(("effect", "interval", "null", "estimate", "whole", "error"), unit)
        | {"recovered": "share of clean − corrupt"},
        gap=x.gap,
        reasons=one_prompt(len(x.bound), "effect"),
        record=x.record() | {"latents with an estimate other than 0": int((guess.mean(0) != 0).sum())},
    )
