"""Effects of a feature circuit's nodes: estimated for all at once, measured for some.

The estimate is a slope of the metric by the submodule's output x times the node's step, with x unchanged as the sum of
latents and error: the gradient passes straight through the dictionary, so that the effects of all nodes add up to that
of x (Marks et al. 2024, arXiv:2403.19647).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.node import Node
from cutaway.features.latents import step_edits
from cutaway.graphs.submodules import Change, Places, Submodule, change
from cutaway.interventions.audit import Audit, audit, rounding
from cutaway.interventions.first_order import slopes
from cutaway.interventions.paired_runs import PairedRuns, difference
from cutaway.models.dry import some
from cutaway.models.edits.library import Add
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

Rule = Literal["midpoint", "sfc"]


@dataclass(frozen=True, eq=False)
class NodeEffects:
    """Estimated effects of every node.

    Attributes:
        runs: the clean run, which is patched, and the corrupt run.
        changes: the nodes' steps, submodule by submodule.
        slopes: the slope at each submodule's site.
        effect: the effects, prompt by prompt, nodes of all submodules in order: place by place latents, then error.
        chance: mean effects of steps as long in random directions.
    """

    runs: PairedRuns
    changes: list[Change]
    slopes: dict[Address, Tensor]
    effect: Float[Tensor, "prompt node"]
    chance: Float[Tensor, "node sample"]

    @property
    def starts(self) -> list[int]:
        """Starts of the submodules' nodes, and the end of the last ones."""
        each = (len(c.places.names) * (c.sub.n_latents + 1) for c in self.changes)
        return list(accumulate(each, initial=0))

    def at(self, node: int) -> tuple[Change, int, int]:
        """Return the submodule's change, the place and the column of a node."""
        b = max(i for i, start in enumerate(self.starts[:-1]) if start <= node)
        place, column = divmod(node - self.starts[b], self.changes[b].sub.n_latents + 1)
        return self.changes[b], place, column

    def name(self, node: int) -> Node:
        """Return a node by its number."""
        c, place, column = self.at(node)
        return c.sub.node(column, c.places.names[place])

    def errors(self) -> Bool[Tensor, "node"]:
        """Return True at the nodes that are errors."""
        each = []
        for c in self.changes:
            columns = torch.arange(c.sub.n_latents + 1) == c.sub.n_latents
            each.append(columns.repeat(len(c.places.names)))
        return torch.cat(each)

    def moves(self) -> Bool[Tensor, "node"]:
        """Return True at the nodes whose value differs between the runs."""
        return torch.cat([c.moves().flatten() for c in self.changes]).cpu() > 0

    def audited(self, model: Model, n: int, seed: int) -> Audit:
        """Measure the effects of some nodes, each exchanged alone."""
        x = self.runs

        def measure(chosen: list[int]) -> Float[Tensor, "chosen prompt"]:
            edits = []
            for c, place, column in map(self.at, chosen):
                step = c.step(column).reshape(x.own[str(c.sub.site)].shape).to(model.dtype)
                edits.append(step_edits({str(c.sub.site): step}, c.places.names[place], x.target))
            return (sweep(model, x.target, edits, x.bound.measure) - x.baseline).float().cpu()

        least = rounding(model, torch.stack([x.clean, x.corrupt]))
        return audit(measure, self.effect.mean(0), n, least, seed=seed, moves=self.moves())


def node_effects(
    model: Model,
    task: Task,
    bound: Bound,
    subs: Sequence[Submodule],
    by: str = "all",
    steps: int = 0,
    rule: Rule = "midpoint",
    samples: int = 1,
    seed: int = 0,
) -> NodeEffects:
    """Estimate the effect of taking each node's corrupt value into the clean run.

    Args:
        model: the model.
        task: the task, for refusals.
        bound: its prompts.
        subs: the submodules.
        by: nodes of all positions together, or of each.
        steps: steps of integrated gradients, for each submodule by itself; 0 for one gradient.
        rule: where the steps lie.
        samples: how many random steps stand beside each.
        seed: of the random steps.

    Raises:
        Refused: a corruption that does not change the metric, or a site that it does not depend on.
    """
    sites = list(dict.fromkeys(a for s in subs for a in (s.site, s.read)))
    x, found = slopes(model, bound, sites, "noise", task.corruption)
    difference(task, x.clean, x.corrupt)
    by_site = {s.site: found[0][str(s.site)] for s in subs}
    if steps:
        by_site = {s.site: _integrated(model, x, s.site, steps, rule) for s in some(subs)}
        by_site = {s.site: by_site.get(s.site, found[0][str(s.site)]) for s in subs}  # a dry run leaves some out
    return estimated(x, subs, by_site, by, samples, seed)


@torch.no_grad()
def estimated(
    x: PairedRuns, subs: Sequence[Submodule], by_site: dict[Address, Tensor], by: str, samples: int, seed: int
) -> NodeEffects:
    """Return the effects of the submodules' nodes, given the slope at each site."""
    changes = [change(s, x.own, x.donor, Places.of(x.target, by), samples, seed) for s in subs]
    effect = torch.cat([c.effects(by_site[c.sub.site]).flatten(1) for c in changes], 1)
    chance = torch.cat([c.chance(by_site[c.sub.site]).flatten(0, 1) for c in changes])
    return NodeEffects(x, changes, by_site, effect.float().cpu(), chance.float().cpu())


def points(steps: int, rule: Rule) -> Float[Tensor, "step"]:
    """Return where along the way from the clean (0) to the corrupt (1) value gradients are taken."""
    return (torch.arange(steps) + (0.5 if rule == "midpoint" else 0.0)) / steps


def _integrated(model: Model, x: PairedRuns, site: Address, steps: int, rule: Rule) -> Tensor:
    """Return the mean gradient along the straight way of one submodule's nodes, which is that of its output."""
    name, step = str(site), x.donor[str(site)] - x.own[str(site)]
    total = torch.zeros_like(step)
    for at in some(points(steps, rule).tolist()):
        total += model.gradients(x.target, name, x.bound.measure, Add(name, step, at))[1][name]
    return total / steps


def kept(effect: Float[Tensor, "prompt node"], least: float) -> Int[Tensor, "kept"]:
    """Return the nodes whose mean effect is at least that large."""
    return (effect.mean(0).abs() >= least).nonzero()[:, 0]
